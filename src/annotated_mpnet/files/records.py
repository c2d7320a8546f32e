"""JSON files as typed records: a damaged or foreign file becomes one clear error.

`msgspec` decodes strictly: NaN, or 2.5e3 or true for a count, are errors. `to_json` is strict too:
the same value always gives the same bytes, so a hash of the text is a hash of the value.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec

from annotated_mpnet.errors import CheckpointError, UserError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

LARGEST_JSON = 16 * 1024 * 1024
"""Bytes. Our JSON files have a few thousand; a longer one is damaged, and is not read."""


def to_json(value: object) -> str:
    """Return the only JSON text for a value: a dataclass, or what JSON knows."""
    plain = dataclasses.asdict
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, default=plain) + "\n"


def decode(path: Path, kind: type[T]) -> T:
    """Decode a JSON file; unknown fields are ignored. Raises `CheckpointError`."""
    with reading(path):
        if regular_size(path) > LARGEST_JSON:
            raise OSError(f"more than {LARGEST_JSON} bytes")
        return msgspec.json.decode(path.read_bytes(), type=kind)


def decode_exactly(path: Path, kind: type[T], **later: object) -> T:
    """Decode a JSON file that has exactly the fields of a dataclass; raises `CheckpointError`.

    A missing field must not become its default. Weights fit a network with either setting of
    `normalize_before`: the wrong one would load without complaint and predict nonsense. Only fields
    that older files do not have yet are given with the value that those meant, in `later`.
    """
    values = {**later, **decode(path, dict[str, Any])}
    with reading(path):
        if odd := get_type_hints(kind).keys() ^ values.keys():
            raise ValueError(f"missing or unknown: {', '.join(sorted(odd))}")
        return msgspec.convert(values, kind)


def regular_size(path: Path) -> int:
    """Return a file's size; raises `OSError` for a FIFO, which would block when it is opened."""
    if not path.is_file():
        raise OSError("missing, or not a regular file")
    return path.stat().st_size


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Turn whatever a damaged or foreign file causes into one `CheckpointError` that names it.

    >>> with reading(Path("state.json")):
    ...     msgspec.json.decode("[NaN]")
    Traceback (most recent call last):
    annotated_mpnet.errors.CheckpointError: state.json cannot be read: DecodeError 'JSON is ...
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{source} cannot be read: {type(error).__name__} {repr(str(error))[:160]}"
        # PyTorch and the system report it in several ways.
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            said += "; it does not fit into memory"
        elif not isinstance(error, OSError):
            said += "; it is damaged, or not what its name says"
        raise CheckpointError(said) from error
