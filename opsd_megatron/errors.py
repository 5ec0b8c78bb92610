"""The errors a user can cause. Each message names the file, key or line at fault and what to do about it.

``train.py`` and the tools print these without a traceback and exit with ``EXIT_BAD_INPUT`` (``EXIT_INTERRUPTED`` where
a run was told to stop); anything else is a defect and keeps its traceback.
"""

EXIT_BAD_INPUT = 2
# A run was told to stop and saved first; EX_TEMPFAIL of sysexits.h, "try again".
EXIT_INTERRUPTED = 75
# A defect, or memory that ran out.
EXIT_DEFECT = 1


class OpsdError(Exception):
    """Base of every error with a remedy in its message."""


class ConfigError(OpsdError):
    """A configuration key is unknown, has a wrong value, or contradicts another key or the launch."""


class DataError(OpsdError):
    """A data file is missing or malformed; the message names the file and the line or column."""


class ModelError(OpsdError):
    """A Hugging Face model directory is missing, is not a Qwen3, or its tensors do not fit its ``config.json``."""


class CheckpointError(OpsdError):
    """A checkpoint is missing, incomplete, belongs to another run, or cannot be written."""


class EngineError(OpsdError):
    """The rollout engine cannot start, or no longer agrees with the trainer."""


class TrainingError(OpsdError):
    """Training cannot go on: the loss or a gradient is not finite."""


class Interrupted(OpsdError):
    """The run was told to stop, and has saved what it had done."""


class OutputError(OpsdError):
    """A file of a run's output cannot be written, for instance because the disk is full."""
