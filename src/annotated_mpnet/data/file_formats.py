r"""How a file becomes documents: text, JSON lines, CSV, Parquet, and the first two compressed.

The rule for text fits in a line, and nearly every reader of lines breaks it: **a document ends at
`\n`, and nowhere else**. Python's text mode also ends lines at a lone `\r`; `str.splitlines` at ten
more characters, among them U+2028, which scraped web text is full of. Which documents there are
must not depend on which of these a library happens to use, so the files are read as bytes:

>>> import tempfile
>>> with tempfile.NamedTemporaryFile(suffix=".txt") as file:
...     _ = file.write(b"\xef\xbb\xbfOne.\r\n\nTwo\xe2\x80\xa8still two.\n")
...     file.flush()
...     list(read_documents(Path(file.name)))
['One.', 'Two\u2028still two.']

A byte order mark at the very beginning and a `\r` before the `\n` belong to the file, not to the
text, and go; a blank line is no document, but is counted; a last line without `\n` is one.

**Columns.** In the other formats a document is a row, and one column of it is the text
(--text-field). It may hold line breaks. The lines of JSON and CSV files go through the same reader
as plain text, so that an error has a line and a byte there too; their parsers are Python's own,
because pyarrow's faster ones read in blocks, and a document longer than a block is an error there.

    ending             a document is
    .txt .txt.gz       a line
    .jsonl .jsonl.gz   a column of an object on a line of its own
    .csv               a column of a row; the first row names the columns
    .parquet           a column of a row

Text that is not UTF-8, or holds NUL bytes (UTF-16, a compressed file, a disk image), stops the run
before it begins, with file, line and byte. Replacing what cannot be decoded would train on question
marks and say nothing; skipping it would lose text and say nothing. For the same reason a file that
is cut off (`.gz`, Parquet) or that cannot be parsed is an error, not a shorter file.

HF: `load_dataset("text")` splits at a lone `\r` too, and annotated-mpnet at whatever
`str.splitlines` knows.

A document is held in memory whole, whatever its length; never more than one (of Parquet, a few).

Next: `sources.py`, which finds the files.
"""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet

from annotated_mpnet.data.counts import Counts, only_text
from annotated_mpnet.errors import DataError

PARQUET_ROWS = 64
"""Rows of a Parquet file that are unpacked together."""

LONGEST_CSV_FIELD = 2**31 - 1
"""Instead of Python's 128 KiB: a document may be a book."""

Values: TypeAlias = Iterator[object]


@dataclass(frozen=True)
class Line:
    """A line of a file: its text with the line's end, its number from 1, and its first byte."""

    text: str
    number: int
    start: int


def read_documents(
    path: Path, counts: Counts | None = None, text_field: str = "text"
) -> Iterator[str]:
    """Yield the documents of a file.

    Args:
        path: the file; its ending names the format, and an unknown one means text.
        counts: is added to, where the caller wants to know.
        text_field: the column that holds the text, in formats with columns.

    Raises:
        DataError: the file cannot be read or parsed, is not UTF-8, holds NUL bytes, or lacks the
            column.
    """
    counts = Counts() if counts is None else counts
    read = next((read for ending, read in COLUMNS.items() if is_called(path, ending)), None)
    counts.files += 1
    before = counts.documents + counts.left_out
    try:
        if read is None:
            lines = (line.text.removesuffix("\n").removesuffix("\r") for line in _lines(path))
            yield from only_text(lines, counts, source=shown(path), text_field="")
        else:
            values = read(path, text_field)
            yield from only_text(values, counts, source=shown(path), text_field=text_field)
    # gzip raises one of these for every way in which a file can be damaged.
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{shown(path)} is damaged or cut off: {shown_text(str(error))}; expected a complete "
            "gzip file: `gzip -t` tells; fetch or write it again"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    counts.empty_files += counts.documents + counts.left_out == before


def _lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, a byte order mark removed."""
    start = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number, start)
            yield Line(text, number, start)
            start += len(line)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    if any(is_called(path, ending) for ending in ENDINGS if ending.endswith(".gz")):
        return gzip.open(path, "rb")
    return path.open("rb")


def _decode(line: bytes, path: Path, number: int, line_start: int) -> str:
    """Decode a line; `line_start` is where it begins in the file, in bytes."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"line {number}, byte {line_start + error.start}"
        raise DataError(
            f"{shown(path)} is not UTF-8: {where} of the file is "
            f"0x{line[error.start]:02x}; expected UTF-8 text: convert it, for example with "
            "`iconv -f LATIN1 -t UTF-8`"
        ) from error
    nul = line.find(b"\0")
    if nul >= 0:
        where = f"line {number}, byte {line_start + nul}"
        raise DataError(
            f"{shown(path)} is not text: {where} of the file is NUL; expected UTF-8 text: is it "
            "UTF-16, or compressed?"
        )
    return text.removeprefix(codecs.BOM_UTF8.decode("utf-8")) if number == 1 else text


def _json_values(path: Path, text_field: str) -> Values:
    columns_are_known = False
    for line in _lines(path):
        if not line.text.strip():
            yield ""
            continue
        row = _parse_json(line, path)
        # Later rows may lack it: that is a row without text, and counted.
        if not columns_are_known:
            _require_column(text_field, list(row), path)
            columns_are_known = True
        yield _encodable(row.get(text_field))


def _parse_json(line: Line, path: Path) -> dict[str, object]:
    where = f"line {line.number}, which begins at byte {line.start}"
    try:
        row = json.loads(line.text)
    # Numbers of 5000 digits and a thousand brackets are not JSON errors to Python.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown(path)}: {where}, is not JSON ({shown_text(str(error))}): "
            f"{shown_text(line.text)}; expected an object on each line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{shown(path)}: {where}, is no JSON object but {shown_text(line.text.strip())}; "
            'expected an object with a column of text on each line, such as {"text": "..."}'
        )
    return row


def _encodable(value: object) -> object:
    """Return a value, or None for text with half a surrogate pair: JSON can spell it, UTF-8 not."""
    try:
        return value.encode() and value if isinstance(value, str) else value
    except UnicodeEncodeError:
        return None


def _csv_values(path: Path, text_field: str) -> Values:
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader((line.text for line in _lines(path)), strict=True)
    try:
        columns = next(reader, None)
        if columns is None:
            return
        _require_column(text_field, columns, path)
        place = columns.index(text_field)
        for row in reader:
            # A blank line is an empty row; one with more or fewer fields has lost a comma.
            if not row:
                yield ""
            else:
                yield row[place] if len(row) == len(columns) else None
    except csv.Error as error:
        raise DataError(
            f"{shown(path)} is not CSV: {shown_text(str(error))} at line {reader.line_num}; "
            'expected fields separated by commas, and "quoted" where they hold line breaks'
        ) from error


def _parquet_values(path: Path, text_field: str) -> Values:
    row = 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            _require_column(text_field, file.schema_arrow.names, path)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[text_field]):
                yield from batch.column(0).to_pylist()
                row += len(batch)
    # Damage shows as any of these, whichever part of the file it is in.
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise DataError(
            f"{shown(path)} is damaged or no Parquet file: {shown_text(str(error))} in or behind "
            f"row {row}; expected a complete file: fetch or write it again"
        ) from error


COLUMNS: dict[str, Callable[[Path, str], Values]] = {
    ".jsonl": _json_values,
    ".jsonl.gz": _json_values,
    ".csv": _csv_values,
    ".parquet": _parquet_values,
}
"""How formats with columns are read, by ending."""

ENDINGS = (".txt", ".txt.gz", *COLUMNS)
"""Endings of the files that a search in a directory takes."""


def is_called(path: Path, ending: str) -> bool:
    """Tell whether a file's name has an ending, in capitals or not."""
    return path.name.lower().endswith(ending)


def has_columns(path: Path) -> bool:
    """Tell whether the text of a file stands in a column."""
    return any(is_called(path, ending) for ending in COLUMNS)


def _require_column(text_field: str, columns: list[str], path: Path) -> None:
    if text_field not in columns:
        raise DataError(
            f"{shown(path)} has no column {shown_text(text_field)}; it has "
            f"{shown_text(', '.join(map(str, columns)))}: name the one that holds the text with "
            "--text-field"
        )


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the system does not let us read."""
    return DataError(
        f"{shown(path)} cannot be read: {error.strerror or shown_text(str(error))}; expected a "
        "readable file"
    )


def shown(path: Path) -> str:
    """Quote a path so that its name cannot break the line, its last 80 characters at most."""
    text = str(path)
    return repr(text if len(text) <= 80 else "..." + text[-77:])


def shown_text(text: str) -> str:
    """Quote foreign text so that it cannot break the line, its first 80 characters at most."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
