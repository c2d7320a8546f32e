"""JSON read with suspicion: what a disk or a hand may have damaged becomes one clear error.

A run's small files (state, configuration, manifest, environment) are JSON, so that they can be read
by eye and by anything. The price is that a parser accepts a great deal: `NaN`, which JSON does not
have; a step of `2.5e3`, a float; `true`, which Python counts as 1; an object where a number should
be; and of two values with the same name the last.

>>> json.loads('{"update": NaN, "seed": 2.5e3, "seed": true}')
{'update': nan, 'seed': True}

None of these would crash anything at once. But no loss is lower than NaN, so that with a NaN as
the best loss so far no checkpoint would be the best ever again. So each value passes through a
function below that says what it must be:

>>> as_count(2500)
2500
>>> as_count(2500.0)
Traceback (most recent call last):
    ...
TypeError: expected a number of things, found 2500.0

and every exception that a foreign parser may raise is caught in one place, `reading`, and becomes
the one line that a user can do something with.

Writing is strict too (`to_json`): one value, one text. As keys are sorted and NaN is refused, the
same state gives the same bytes in any run, and a hash of the text is a hash of the value
(`checkpoints/manifest.py` lives on this).

Next: `checkpoints/manifest.py`.
"""

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from annotated_mpnet.errors import CheckpointError, ConfigError

JsonObject = dict[str, object]

LARGEST_JSON = 16 * 1024 * 1024
"""Bytes. A JSON file of ours has a few thousand; a longer one is damaged, and is not read."""


def short(value: object) -> str:
    """Return a value from a file in a form that is safe to print: escaped, at most 80 characters.

    A terminal obeys what it is shown. The text of a damaged or malicious file could colour it, move
    its cursor, or add lines to a log that nobody wrote; `repr` leaves nothing to obey.

    >>> short("\\x1b[31mred")
    "'\\\\x1b[31mred'"
    """
    return repr(value)[:80]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a parser raise into one `CheckpointError`.

    This is the one place where foreign parsers are wrapped. The list is long because it has been
    collected: JSON, UTF-8, safetensors and our own dataclasses each complain in their own way.

    >>> try:
    ...     with reading(Path("state.json")):
    ...         {}["update"]
    ... except CheckpointError as error:
    ...     print(error)
    state.json cannot be read (KeyError: "'update'"); it is damaged, or not a file of this program

    What is inside of it must be reading and nothing else: a bug of ours that raises a `TypeError`
    in there would be called a damaged file.

    Raises:
        CheckpointError: names the file, the kind of damage and its text, escaped and cut.
    """
    try:
        yield
    except CheckpointError:  # has been explained already, further in
        raise
    except (
        OSError,
        ValueError,  # JSON, UTF-8, too many digits
        TypeError,
        LookupError,
        ArithmeticError,
        RuntimeError,  # torch; nesting too deep
        MemoryError,
        SafetensorError,
        ConfigError,
    ) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {short(str(error))}); it is damaged, "
            "or not a file of this program"
        ) from error


def to_json(value: object) -> str:
    """Return the one text that stands for a value: sorted keys, no NaN, a newline at the end.

    >>> to_json({"b": 1, "a": 2}) == to_json({"a": 2, "b": 1})
    True
    """
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> JsonObject:
    """Read a JSON object; raises `CheckpointError` for anything else.

    The size is looked at before a byte is read, and the bytes are decoded as UTF-8 and nothing
    else: `json.loads` by itself would guess at UTF-16 and UTF-32 too.
    """
    with reading(path):
        if regular_size(path) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        value = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"expected a JSON object, found {type(value).__name__}")
        return value


def regular_size(path: Path) -> int:
    """Return a file's size in bytes; raises `OSError` for what is no regular file.

    A FIFO in the place of a file would block whoever opened it, for ever.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status.st_size


def as_text(value: object) -> str:
    """Return a JSON value that must be a string; raises `TypeError`."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def as_count(value: object) -> int:
    """Return a JSON value that must be an integer from 0 to 2**63 - 1; raises `TypeError`."""
    # By `type`, not `isinstance`: True is an instance of int. JSON has no largest number; ours is
    # what still fits a tensor of int64.
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"expected a number of things, found {value!r}")
    return value


def as_number(value: object) -> float:
    """Return a JSON value that must be a finite number; raises `TypeError`.

    >>> as_number(7)
    7.0
    """
    # Not even 1e999, which is legal JSON and becomes infinite only in Python.
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise TypeError(f"expected a finite number, found {value!r}")
    return float(value)  # type: ignore[arg-type]
