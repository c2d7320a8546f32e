"""What can go wrong for a user. Everything else is a bug and keeps its traceback.

The command line prints the one line of a `UserError` and exits with its code. A message says what
happened, the value, what was expected, and what to do.

Messages hold names of files and words of texts, which come from anywhere. `printable` is applied
where they leave the program: on standard error, in `log.txt`, on the console.
"""

import re
import reprlib
from pathlib import Path

QUOTING = reprlib.Repr()
QUOTING.maxstring = QUOTING.maxother = 80


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
    """A batch does not fit into memory, or a process was killed, most likely for lack of it."""

    exit_code = 7


class ProcessLostError(UserError):
    """Another process of a distributed run died or did not answer in time."""


class FailedElsewhereError(UserError):
    """Another process of a distributed run failed and printed why. This one exits with its code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def shown(value: object) -> str:
    r"""Quote a value from outside in at most about 80 characters, so it cannot break a message.

    A path keeps its end, a text its beginning. Deep or long values are abridged: nine short lines
    of YAML can name a billion of them.

    >>> shown("\x1b[31mred"), shown(Path("text\nall is well.txt"))
    ("'\\x1b[31mred'", "'text\\nall is well.txt'")
    >>> len(shown("a" * 500)), len(shown(Path("a" * 500)))
    (82, 82)
    """
    if isinstance(value, Path):
        path = str(value)
        return repr(path if len(path) <= 80 else "..." + path[-77:])
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    return QUOTING.repr(value)[:80]


def without_password(text: str) -> str:
    """Cut user and password out of addresses.

    >>> without_password("https://me:hunter2@example.org/texts")
    'https://example.org/texts'
    >>> without_password("cannot read https:/me:hunter2@example.org")  # as a path is written
    'cannot read https:/example.org'
    >>> without_password("me:hunter2@example.org:texts")
    'example.org:texts'
    """
    text = re.sub(r"(:/+)[^\s/]*@", r"\1", text)
    return re.sub(r"(?<![^\s'\"=])[^\s/:@'\"=]+:[^\s/@]+@", "", text)


def printable(text: str) -> str:
    r"""Return a message as one line that changes nothing but what is read, without passwords.

    Escaped are control characters (a terminal would obey them), line breaks, characters that turn
    the direction of writing, and bytes of file names that are not UTF-8.

    >>> print(printable("caf\udce9 \x1b[2J\n été"))
    caf\udce9 \x1b[2J\n été
    """
    return "".join(
        each if each.isprintable() else repr(each)[1:-1] for each in without_password(text)
    )
