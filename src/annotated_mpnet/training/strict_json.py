"""JSON read with suspicion: what a disk or a hand may have damaged becomes one clear error.

A run's small files (state, configuration, manifest, environment) are JSON, so that they can be read
by eye and by anything. The price is that a parser accepts a great deal: `NaN`, a step of `2.5e3`,
an object where a number should be. So each value passes through a function below that says what it
must be, and every exception that a foreign parser may raise is caught in one place, `reading`.

Next: `manifest.py`.
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

    >>> short("\\x1b[31mred")
    "'\\\\x1b[31mred'"
    """
    return repr(value)[:80]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a parser raise into one `CheckpointError`.

    This is the one place where foreign parsers are wrapped. The list is long because it has been
    collected: JSON, UTF-8, safetensors and our own dataclasses each complain in their own way.
    """
    try:
        yield
    except CheckpointError:
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
    """Return the one text that stands for a value: sorted keys, no NaN, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> JsonObject:
    """Read a JSON object; raises `CheckpointError` for anything else."""
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
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"expected a number of things, found {value!r}")
    return value


def as_number(value: object) -> float:
    """Return a JSON value that must be a finite number; raises `TypeError`."""
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise TypeError(f"expected a finite number, found {value!r}")
    return float(value)  # type: ignore[arg-type]
