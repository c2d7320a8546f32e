"""What can go wrong, sorted by who can mend it.

A mistake of the user's (a wrong flag, a broken file, a full disk) becomes a `UserError`: the
command line prints its one line and exits with the number that the class carries. Everything else
is a bug and keeps its traceback. A good message says what happened, the value seen, what was
expected, and the command that mends it.
"""


class UserError(Exception):
    """A mistake that its reader can mend; never raised for a bug of ours."""

    exit_code = 1


class ConfigError(UserError):
    """A flag or a configuration that cannot work. Raised before any model is built."""

    exit_code = 2


class DataError(UserError):
    """Text that cannot be read, or that holds nothing to train on."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign, or does not belong to the run that wants it."""

    exit_code = 4


class DivergedError(UserError):
    """The loss or the gradient stopped being a number; the update was not applied."""

    exit_code = 5


class WriteError(UserError):
    """The run's directory could not be written: full disk, lost permission."""

    exit_code = 6


class OutOfMemoryError(UserError):
    """A batch did not fit into the memory of the device, or of the machine."""

    exit_code = 7


class ProcessLostError(UserError):
    """Another process of a distributed run ended, or did not answer in time."""


class FailedElsewhereError(UserError):
    """Another process of a distributed run failed and has said why; this one ends with its code.

    It is not printed: eight processes would say eight times what is wrong with one of them.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
