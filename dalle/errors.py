"""What a caller can do wrong; the command line prints these in one line and exits with 2."""


class DalleError(Exception):
    """A caller's mistake: the message says what came, what was expected and what to do."""


class ConfigError(DalleError):
    """A setting, a preset or a combination of them that cannot be."""


class DataError(DalleError):
    """Pictures, captions or prompts that cannot be used."""


class CheckpointError(DalleError):
    """A run folder, a weights file or a training state that cannot be read, written or combined."""
