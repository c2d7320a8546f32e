r"""How a file becomes documents: text, JSON, CSV, Parquet, Arrow; compressed or not.

    ending             a document is
    .txt               a line
    .jsonl             a column of an object on a line of its own
    .csv .tsv          a column of a row; the first row names the columns
    .json              a column of an object of an array, or of an object on a line of its own
    .parquet .arrow    a column of a row

All but the last two may be compressed (.gz .bz2 .xz .zst). The first bytes decide about that, not
the name. A search in a directory takes no .json, .tsv and .arrow, which there are mostly settings
and notes; give such a file by itself.

**A document of a text file ends at `\n`, and nowhere else.** Python's text mode also ends lines at
a lone `\r`, and `str.splitlines` at eight more characters, among them U+2028, which web text is
full of:

>>> import io, tempfile
>>> text = "one\rstill one\u2028still one\ntwo\n"
>>> len(text.split("\n")) - 1, len(io.StringIO(text, newline=None).readlines())
(2, 3)
>>> len(text.splitlines())
4

So files are read as bytes and cut at 0x0A, which is never part of a longer UTF-8 character. A byte
order mark and the `\r` of `\r\n` are removed, blank lines are counted:

>>> with tempfile.NamedTemporaryFile(suffix=".txt") as file:
...     _ = file.write(b"\xef\xbb\xbfOne.\r\n\nTwo\xe2\x80\xa8still two.\n")
...     file.flush()
...     list(read_documents(Path(file.name)))
['One.', 'Two\u2028still two.']

JSON and CSV lines go through the same reader, so errors name line and byte. The parsers are
Python's, because pyarrow's fail on a document longer than a block. An array of JSON is read whole.

Text that is not UTF-8 or holds NUL bytes, and a file that is cut off or cannot be parsed, are
errors with file, line and byte: replacing or skipping would change the text in silence.

Readers are generators: a document is in memory whole, and never more than one (of Parquet,
`PARQUET_ROWS`). Foreign text is quoted and cut in every message, so it cannot recolour the terminal
or pass for a line of ours.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeAlias

import pyarrow as pa
import pyarrow.parquet

from annotated_mpnet.errors import DataError, shown
from annotated_mpnet.text.counts import Counts, only_text

PARQUET_ROWS = 64
"""Unpacked together, instead of pyarrow's 65,536, which may be gigabytes of documents."""

LONGEST_CSV_FIELD = 2**31 - 1
"""Instead of Python's 128 KiB; the most that fits a C `long` on Windows."""

Values: TypeAlias = Iterator[object]
"""A column's values, text or not: `counts.only_text` sorts them."""


@dataclass(frozen=True)
class Line:
    r"""A line of a file, and where it is.

    Attributes:
        text: decoded, with its end (`\n` or `\r\n`): a quoted CSV field may continue after it.
        number: from 1.
        start: its first byte in the (unpacked) file, from 0.
    """

    text: str
    number: int
    start: int


def read_documents(
    path: Path, counts: Counts | None = None, text_field: str = "text"
) -> Iterator[str]:
    """Yield the documents of a file.

    Args:
        path: its ending names the format; an unknown one means text.
        counts: updated.
        text_field: the column that holds the text, in formats with columns.

    Raises:
        DataError: the file cannot be read or parsed, is not UTF-8, holds NUL bytes, or lacks the
            column.
    """
    counts = Counts() if counts is None else counts
    if any(path.name.lower().endswith(ending) for ending in REFUSED):
        raise DataError(
            f"{shown(path)} is not plain text by its name; expected a document per line (.txt), or "
            f"one of {', '.join(COLUMNS)}"
        )
    read = next((read for ending, read in COLUMNS.items() if is_called(path, ending)), None)
    counts.files += 1
    # `text/hold_out.py` moves documents to `left_out` while this generator waits: a file of such
    # documents is not empty.
    before = counts.documents + counts.left_out
    try:
        if read is None:
            lines = (line.text.removesuffix("\n").removesuffix("\r") for line in _lines(path))
            yield from only_text(lines, counts, source=shown(path), text_field="")
        else:
            values = read(path, text_field)
            yield from only_text(values, counts, source=shown(path), text_field=text_field)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # bz2 and zstd say it without a number of the system.
        raise (unreadable(path, error) if error.errno else _damaged(path, error)) from error
    counts.empty_files += counts.documents + counts.left_out == before


def _lines(path: Path) -> Generator[Line]:
    """Yield the lines of a file, without a byte order mark."""
    start = 0
    # A file in binary mode iterates over lines that end in 0x0A.
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number, start)
            yield Line(text, number, start)
            start += len(line)


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, unpacked if it is compressed (`cat a.gz b.gz` works too).

    Raises:
        DataError: its first bytes are those of a format that is not text.
    """
    with path.open("rb") as file:
        first = file.read(8)
    for magic, kind in NOT_TEXT.items():
        if first.startswith(magic):
            raise DataError(f"{shown(path)} is {kind}")
    for magic, opener in COMPRESSED.items():
        if first.startswith(magic):
            return opener(path)
    if first and path.suffix.lower() in COMPRESSIONS:
        raise _damaged(path, ValueError(f"it begins with {first!r}"))
    return path.open("rb")


def _open_gzip(path: Path) -> IO[bytes]:
    return io.BufferedReader(gzip.open(path, "rb"))


def _open_zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))


COMPRESSED: dict[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": _open_gzip,
    b"BZh": partial(bz2.open, mode="rb"),
    b"\xfd7zXZ\0": partial(lzma.open, mode="rb"),
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
"""By the first bytes. pyarrow comes with zstd; Python has it from 3.14 on."""

NOT_TEXT = {
    codecs.BOM_UTF32_LE: "UTF-32; expected UTF-8: convert it with `iconv -f UTF-32 -t UTF-8`",
    codecs.BOM_UTF32_BE: "UTF-32; expected UTF-8: convert it with `iconv -f UTF-32 -t UTF-8`",
    codecs.BOM_UTF16_LE: "UTF-16; expected UTF-8: convert it with `iconv -f UTF-16 -t UTF-8`",
    codecs.BOM_UTF16_BE: "UTF-16; expected UTF-8: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"PK\x03\x04": "a zip archive (or a document of an office program); unpack it to plain text",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"%PDF-": "a PDF file; extract its text first, for example with pdftotext",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"ARROW1": "an Arrow file; give it the ending .arrow",
}
"""What a file is by its first bytes, and what to do. UTF-32 before UTF-16, which begins alike."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

REFUSED = (
    *(".html", ".htm", ".xml", ".rtf", ".ipynb", ".tex.gz", ".tar", ".tgz", ".tar.gz", ".tar.bz2"),
    *(".tar.xz", ".tar.zst", ".pdf", ".docx", ".doc", ".odt", ".epub", ".zip", ".7z", ".rar"),
    *(".xlsx", ".xls", ".pt", ".bin", ".safetensors", ".npy", ".npz", ".pkl", ".lock"),
)
"""Endings of what is not one document per line, even if all of it can be read as text."""


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{shown(path)} is damaged or cut off: {shown(str(error))}; expected a complete "
        "compressed file: fetch or write it again"
    )


def _decode(line: bytes, path: Path, number: int, line_start: int) -> str:
    r"""Decode a line, or say which byte of the file is in the way.

    >>> _decode(b"caf\xe9\n", Path("a.txt"), number=2, line_start=14)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_mpnet.errors.DataError: 'a.txt' is not UTF-8: line 2, byte 17 of the file is 0xe9; ...
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"line {number}, byte {line_start + error.start}"
        raise DataError(
            f"{shown(path)} is not UTF-8: {where} of the file is "
            f"0x{line[error.start]:02x}; expected UTF-8 text: convert it, for example with "
            "`iconv -f LATIN1 -t UTF-8`"
        ) from error
    # NUL is valid UTF-8 and the sign of UTF-16 without a byte order mark.
    nul = line.find(b"\0")
    if nul >= 0:
        where = f"line {number}, byte {line_start + nul}"
        raise DataError(
            f"{shown(path)} is not text: {where} of the file is NUL; expected UTF-8 text: is it "
            "UTF-16, or compressed?"
        )
    return text.removeprefix(codecs.BOM_UTF8.decode("utf-8")) if number == 1 else text


def _json_values(path: Path, text_field: str) -> Values:
    """Yield a column of a file with a JSON object on each line."""
    columns_are_known = False
    for line in _lines(path):
        if not line.text.strip():
            yield ""
            continue
        row = _parse_json(line, path)
        # If the first object lacks the column, its name is wrong; a later one is a row without
        # text.
        if not columns_are_known:
            _require_column(text_field, list(row), path)
            columns_are_known = True
        yield encodable(row.get(text_field))


def _json_document_values(path: Path, text_field: str) -> Values:
    """Yield a column of the objects in a JSON array, or of objects on lines of their own.

    An array may hold texts too; a single object is an array of one.
    """
    lines = _lines(path)
    first = next((line for line in lines if line.text.strip()), None)
    lines.close()
    if first is None:
        return
    has_lines = False
    with suppress(ValueError, RecursionError):
        # An object that ends with its line: JSON lines, by another name.
        has_lines = isinstance(json.loads(first.text), dict)
    if has_lines:
        yield from _json_values(path, text_field)
        return
    text = "".join(line.text for line in _lines(path))
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown(path)} is not JSON: {shown(str(error))}; expected an array of objects, "
            "or an object on each line"
        ) from error
    rows = [array] if isinstance(array, dict) else array
    if not isinstance(rows, list):
        raise DataError(
            f"{shown(path)} is {shown(text.strip())}; expected an array of objects, or an "
            "object on each line"
        )
    names = next((list(row) for row in rows if isinstance(row, dict)), None)
    if names is not None:
        _require_column(text_field, names, path)
    for row in rows:
        yield encodable(row.get(text_field) if isinstance(row, dict) else row)


def _parse_json(line: Line, path: Path) -> dict[str, object]:
    """Return the object on a line.

    >>> _parse_json(Line('{"text": "one"}', number=1, start=0), Path("a.jsonl"))
    {'text': 'one'}
    >>> _parse_json(Line('{"text": tw', number=2, start=16), Path("a.jsonl"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_mpnet.errors.DataError: 'a.jsonl': line 2, which begins at byte 16, is not JSON ...
    """
    where = f"line {line.number}, which begins at byte {line.start}"
    try:
        row = json.loads(line.text)
    # A thousand brackets are a RecursionError.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown(path)}: {where}, is not JSON ({shown(str(error))}): "
            f"{shown(line.text)}; expected an object on each line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{shown(path)}: {where}, is not a JSON object: {shown(line.text.strip())}; "
            'expected an object with a column of text on each line, such as {"text": "..."}'
        )
    return row


def encodable(value: object) -> object:
    r"""Return a value, or None for text with half a surrogate pair: JSON can spell it, UTF-8 not.

    A program that cuts strings by length may leave one; the error would come later, from the hash
    or the tokenizer, without line or file.

    >>> [encodable(json.loads(text)) for text in (r'"\ud83d\ude00"', r'"\ud83d"', '""', "3")]
    ['😀', None, '', 3]
    """
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _csv_values(path: Path, text_field: str, delimiter: str = ",") -> Values:
    r"""Yield a column of a CSV file, whose first row names the columns.

    A quoted field may hold line breaks, so the parser is fed lines with their ends.

    >>> lines = ["id,text\n", '1,"two\n', 'lines"\n', "\n", "2\n"]
    >>> list(csv.reader(lines, strict=True))
    [['id', 'text'], ['1', 'two\nlines'], [], ['2']]
    """
    # Without `strict`, an unclosed quotation swallows the rest of the file as one document.
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader((line.text for line in _lines(path)), strict=True, delimiter=delimiter)
    try:
        columns = next(reader, None)
        if columns is None:
            return
        _require_column(text_field, columns, path)
        place = columns.index(text_field)
        for row in reader:
            if not row:
                yield ""
                continue
            # With more or fewer fields, it is not clear which one is the text.
            if len(row) != len(columns):
                raise DataError(
                    f"{shown(path)}: line {reader.line_num} has {len(row)} fields, and the first "
                    f"line names {len(columns)}: {shown(delimiter.join(row))}; put quotes "
                    "around texts that hold a separator"
                )
            yield row[place]
    except csv.Error as error:
        raise DataError(
            f"{shown(path)} is not CSV: {shown(str(error))} at line {reader.line_num}; "
            'expected fields separated by commas, and "quoted" where they hold line breaks'
        ) from error


def _parquet_values(path: Path, text_field: str) -> Values:
    """Yield a column of a Parquet file; the others are not read."""
    row = 0
    try:
        # The columns are listed at the end of the file: one that is cut off fails here.
        with pa.parquet.ParquetFile(path) as file:
            _require_column(text_field, file.schema_arrow.names, path)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[text_field]):
                yield from batch.column(0).to_pylist()
                row += len(batch)
    # An OSError with a message of the system is not about the file's contents.
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise DataError(
            f"{shown(path)} is damaged or not a Parquet file: {shown(str(error))} in or after "
            f"row {row}; expected a complete file: fetch or write it again"
        ) from error


def _arrow_values(path: Path, text_field: str) -> Values:
    """Yield a column of an Arrow file, as `datasets` saves them: a stream, or with an index."""
    try:
        with pa.memory_map(str(path)) as file:
            try:
                batches = iter(pa.ipc.open_stream(file))
                schema = batches.schema
            except pa.ArrowInvalid:
                indexed = pa.ipc.open_file(file)
                schema = indexed.schema
                batches = map(indexed.get_batch, range(indexed.num_record_batches))
            _require_column(text_field, schema.names, path)
            for batch in batches:
                column = batch.column(schema.names.index(text_field))
                for start in range(0, len(column), PARQUET_ROWS):
                    yield from column[start : start + PARQUET_ROWS].to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{shown(path)} is damaged or not an Arrow file: {shown(str(error))}; expected a "
            "complete file: write it again"
        ) from error


COLUMNS: dict[str, Callable[[Path, str], Values]] = {
    ".jsonl": _json_values,
    ".csv": _csv_values,
    ".parquet": _parquet_values,
    ".json": _json_document_values,
    ".tsv": partial(_csv_values, delimiter="\t"),
    ".arrow": _arrow_values,
}
"""Formats with columns, by ending; a reader yields a value for each row, None if there is none."""

SEARCHED = (".txt", ".jsonl", ".csv", ".parquet")
"""Endings that a search in a directory takes; a file that is given explicitly may have any."""


def is_called(path: Path, ending: str) -> bool:
    """Tell whether a file's name has an ending, in capitals or not, compressed or not.

    >>> path = Path("Wiki.en.JSONL.GZ")
    >>> is_called(path, ".jsonl"), is_called(path, ".txt"), is_called(Path("a.csv"), ".csv")
    (True, False, True)
    """
    suffixes = [each.lower() for each in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1:] == [ending]


def has_columns(path: Path) -> bool:
    """Tell whether the text of a file is in a column (--text-field)."""
    return any(is_called(path, ending) for ending in COLUMNS)


def _require_column(text_field: str, columns: list[str], path: Path) -> None:
    """Raise a `DataError` that lists the columns, if the wanted one is not among them.

    No guessing: a wrong guess trains on titles or addresses, and looks like success.
    """
    if text_field not in columns:
        raise DataError(
            f"{shown(path)} has no column {shown(text_field)}; it has "
            f"{shown(', '.join(map(str, columns)))}: name the one that holds the text with "
            "--text-field"
        )


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the system does not let us read."""
    return DataError(
        f"{shown(path)} cannot be read: {error.strerror or shown(str(error))}; expected a "
        "readable file"
    )
