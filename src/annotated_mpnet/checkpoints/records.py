"""JSON files as typed records: a damaged or foreign file becomes one clear error.

The small files of a run are JSON, so a person can read them. `msgspec` decodes them strictly: NaN,
2.5e3 or true for a count, and unknown or missing fields are errors.

Writing is strict too: `to_json` sorts keys and refuses NaN, so the same value always gives the same
bytes, and a hash of the text is a hash of the value (`checkpoints/manifest.py` relies on this).
"""

import dataclasses
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from safetensors import SafetensorError

from annotated_mpnet.errors import CheckpointError

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number of things; at most what fits a tensor of int64."""

LARGEST_JSON = 16 * 1024 * 1024
"""Bytes. Our JSON files have a few thousand; a longer one is damaged, and is not read."""


def to_json(value: object) -> str:
    """Return the only JSON text for a value (a dataclass, or what JSON knows)."""
    text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False, default=dataclasses.asdict)
    return text + "\n"


def decode(path: Path, kind: type[T]) -> T:
    """Decode a JSON file; raises `CheckpointError`. A dataclass may have more fields in the file."""
    with reading(path):
        return msgspec.json.decode(read_small(path), type=kind)


def decode_exactly(path: Path, kind: type[T]) -> T:
    """Decode a JSON file that must have exactly the fields of a dataclass.

    A missing field must not become its default. Weights fit a network with either setting of
    `normalize_before`: the wrong one would load without complaint and predict nonsense.
    """
    # Of the same fields, but without defaults.
    fields = list(get_type_hints(kind, include_extras=True).items())
    strict: Any = msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True)
    values = msgspec.structs.asdict(decode(path, strict))
    with reading(path):
        # A dataclass may check its own numbers.
        return kind(**values)


def read_small(path: Path) -> bytes:
    """Return a JSON file's bytes; raises `OSError` or `ValueError` for what cannot be one."""
    if regular_size(path) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON} bytes")
    return path.read_bytes()


def regular_size(path: Path) -> int:
    """Return a file's size in bytes; raises `OSError` if it is not a regular file.

    Opening a FIFO would block until something writes to it.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status.st_size


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises for a damaged file into one `CheckpointError`.

    >>> with reading(Path("state.json")):
    ...     msgspec.json.decode("[NaN]")
    Traceback (most recent call last):
    annotated_mpnet.errors.CheckpointError: state.json cannot be read (DecodeError: 'JSON is ...
    """
    try:
        yield
    except (
        OSError,
        ValueError,  # msgspec, UTF-8, and the checks of our own dataclasses
        RuntimeError,  # nested too deeply; torch
        MemoryError,
        SafetensorError,
    ) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {short(str(error))}); it is damaged "
            "or not a file of this program"
        ) from error


def short(value: object) -> str:
    r"""Return a value from a file in a form that is safe to print: escaped, at most 80 characters.

    A terminal obeys what it is shown: unescaped, a file could add lines to the log.

    >>> short("\x1b[31mred")
    "'\\x1b[31mred'"
    """
    return repr(value)[:80]
