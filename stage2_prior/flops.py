"""What a picture costs of matrix products, two operations for a multiplication and an addition.

Counted is what the model asks for: attention over the slots that the masks allow, the image head at image
slots, the text head at text tokens. What a form of attention computes besides is not.
"""

from collections import Counter
from functools import cache

from stage2_prior.config import PriorConfig
from stage2_prior.masks import dense, kinds

LAYER = 12  # weights of a layer's matrices, in squares of the width


def matrix_flops(config: PriorConfig, words: int = 0) -> int:
    """FLOPs of one picture's forward pass, with so many text tokens; the backward pass takes twice that."""
    c = config
    return _layers(c) + 2 * c.width * (c.cells * c.image_vocab + words * c.text_vocab)


def flops(config: PriorConfig, recompute: bool) -> int:
    """FLOPs of one picture's training, all text slots filled; layers that are recomputed run twice."""
    return 3 * matrix_flops(config, config.text_length) + recompute * _layers(config)


@cache
def _layers(c: PriorConfig) -> int:
    layers_of = Counter(kinds(c.depth))
    pairs = sum(n * int(dense(kind, c.text_length, c.grid, c.kernel).sum()) for kind, n in layers_of.items())
    return 2 * (LAYER * c.width**2 * c.depth * c.length + 2 * c.width * pairs)
