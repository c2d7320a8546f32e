"""What can go wrong for a user. Everything else is a bug and keeps its traceback.

The command line prints the one line of a `UserError` and exits with its code. A message says what
happened, the value, what was expected, and what to do.
"""


class UserError(Exception):
    """An error that the user can fix."""

    exit_code = 1


class ConfigError(UserError):
    """A setting that cannot work. Raised before any model is built."""

    exit_code = 2


class DataError(UserError):
    """Text that cannot be read or contains nothing to train on."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is damaged, of another program, or of another run."""

    exit_code = 4


class DivergedError(UserError):
    """A NaN or infinite loss or gradient. The update was not applied."""

    exit_code = 5


class WriteError(UserError):
    """The run's directory cannot be written: full disk, no permission."""

    exit_code = 6


class OutOfMemoryError(UserError):
    """A batch does not fit into the memory of the device or the machine."""

    exit_code = 7


class ProcessLostError(UserError):
    """Another process of a distributed run died or did not answer in time."""


class FailedElsewhereError(UserError):
    """Another process of a distributed run failed and printed why. This one exits with its code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
