"""What can go wrong, as exceptions that know their exit code and say what would work.

`run.py` turns each into one line on stderr and the process' exit status:
0 done, 1 bug, 2 usage, 3 does not fit or out of memory, 4 non-finite, 5 checkpoint missing,
corrupt or incompatible, 6 input/output, 129/130/143 interrupted after saving.
"""

from typing import Any


class TrainerError(Exception):
    """Base of every foreseen failure. The message says what, where, and what would work."""

    exit_code = 1


class UsageError(TrainerError):
    """A setting or an input file that cannot work as given."""

    exit_code = 2


class DoesNotFit(TrainerError):
    """The plan needs more memory than there is."""

    exit_code = 3


class OutOfMemory(DoesNotFit):
    """Memory ran out in the middle of a run; `failure` (trainer.recovery) says where, and what is saved."""

    def __init__(self, failure: Any):
        super().__init__(str(failure))
        self.failure = failure


class NonFinite(TrainerError):
    """A NaN or an infinity was met; nothing was applied to the weights."""

    exit_code = 4


class CheckpointError(TrainerError):
    """A checkpoint or an eraser file is missing, corrupt, or belongs to something else."""

    exit_code = 5


class InputOutputError(TrainerError):
    """A file could not be read or written."""

    exit_code = 6


class Interrupted(TrainerError):
    """The run stopped on a signal after saving. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
