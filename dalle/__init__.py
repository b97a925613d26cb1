"""The ground both stages stand on, and `dalle.pipeline`, the roof over them.

Nothing is imported here: the stages import modules of this package while `dalle.pipeline` imports
the stages.
"""

__version__ = "0.1.0"
