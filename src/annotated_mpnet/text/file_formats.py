r"""How a file becomes documents: text, JSON lines, CSV, Parquet, and the first two compressed.

The rule for text fits in a line, and nearly every reader of lines breaks it: **a document ends at
`\n`, and nowhere else**. Python's text mode also ends lines at a lone `\r`; `str.splitlines` at
eight more characters, among them U+2028, which scraped web text is full of:

>>> import io, tempfile
>>> text = "one\rstill one\u2028still one\ntwo\n"
>>> len(text.split("\n")) - 1, len(io.StringIO(text, newline=None).readlines())
(2, 3)
>>> len(text.splitlines())
4
>>> "".join(c for c in map(chr, range(0x3000)) if len(f"a{c}b".splitlines()) > 1)
'\n\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029'

Which documents there are must not depend on which of these a library happens to use: packed rows,
their masks and the fingerprint of the text all hang on it. So files are read as bytes, and bytes
are cut at 0x0A. In UTF-8 that is safe before anything is decoded, because each byte of a longer
character has its highest bit set: a 0x0A is never a part of one.

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
Parsing is not what a start waits for: tokenising the same text takes far longer.

    ending             a document is
    .txt .txt.gz       a line
    .jsonl .jsonl.gz   a column of an object on a line of its own
    .csv               a column of a row; the first row names the columns
    .parquet           a column of a row

Text that is not UTF-8, or holds NUL bytes (UTF-16, a compressed file, a disk image), stops the run
before it begins, with file, line and byte. Replacing what cannot be decoded would train on question
marks and say nothing; skipping it would lose text and say nothing. For the same reason a file that
is cut off (`.gz`, Parquet) or that cannot be parsed is an error, not a shorter file.

HF: `load_dataset("text")` opens files in Python's text mode, and so splits at a lone `\r` too;
annotated-mpnet at whatever `str.splitlines` knows.

**Memory.** All readers are generators, one inside the other: bytes of the file, lines, values of a
column, text. A document is held in memory whole, whatever its length; never more than one (of
Parquet, `PARQUET_ROWS`). Reading a terabyte needs no more than its longest document.

**Messages.** What stands in a file, its name included, was written by somebody else. Printed as it
is, a line with the escape code of a terminal could recolour the screen, or a line break pass for a
line of ours. So foreign text is quoted and cut (`shown`, `shown_text`) in every message.

Next: `text/sources.py`, which finds the files.
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

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.counts import Counts, only_text

PARQUET_ROWS = 64
"""Rows of a Parquet file that are unpacked together, instead of pyarrow's 65,536: as documents, and
not numbers, so many may be gigabytes."""

LONGEST_CSV_FIELD = 2**31 - 1
"""Instead of Python's 128 KiB: a document may be a book. Not larger, since Python hands the number
to a `long` of C, which on Windows has 32 bits."""

Values: TypeAlias = Iterator[object]
"""What stands in a column, row by row: nobody promises that it is text. `counts.only_text` sorts it
out, for all formats alike."""


@dataclass(frozen=True)
class Line:
    r"""A line of a file, and where to find it again with an editor or a hex dump.

    Attributes:
        text: decoded, its end (`\n` or `\r\n`) included: a quoted CSV field goes on behind it.
        number: from 1.
        start: its first byte in the file, from 0; of a compressed file, in what it unpacks to.
    """

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
    # Left-out documents are counted too: `text/hold_out.py` moves them over while this generator waits,
    # and a file of which all documents went to the other side is not an empty one.
    before = counts.documents + counts.left_out
    try:
        # The end of a line of text is not the document's. `strip` would take more than the end:
        # white space at the edges of a document is its own, though most tokenizers drop it.
        if read is None:
            lines = (line.text.removesuffix("\n").removesuffix("\r") for line in _lines(path))
            yield from only_text(lines, counts, source=shown(path), text_field="")
        else:
            values = read(path, text_field)
            yield from only_text(values, counts, source=shown(path), text_field=text_field)
    # gzip raises one of these for every way in which a file can be damaged: an end that comes too
    # early, bits that no compressor writes, a check sum that is another's.
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
    # A file that is open in binary mode is an iterator of lines that end in 0x0A: the one loop in
    # Python that follows the rule of this module.
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number, start)
            yield Line(text, number, start)
            start += len(line)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    """Open a file for reading bytes, unpacked on the way if it is one of the compressed formats.

    A compressed file may be several in a row, as `cat a.gz b.gz` makes them: the format allows it,
    crawls are published that way, and `gzip` reads on.
    """
    if any(is_called(path, ending) for ending in ENDINGS if ending.endswith(".gz")):
        return gzip.open(path, "rb")
    return path.open("rb")


def _decode(line: bytes, path: Path, number: int, line_start: int) -> str:
    r"""Decode a line, or say which byte of the file is in the way.

    >>> _decode(b"caf\xe9\n", Path("a.txt"), number=2, line_start=14)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_mpnet.errors.DataError: 'a.txt' is not UTF-8: line 2, byte 17 of the file is 0xe9; ...

    Args:
        line: its bytes.
        path: of the file, for the message.
        number: of the line, from 1.
        line_start: where it begins in the file, in bytes.

    Raises:
        DataError: the line is not UTF-8, or holds a NUL.
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
    # NUL is valid UTF-8, and stands in no text. It is the sign of UTF-16 without a byte order mark,
    # where every other byte of English is one; tokenised, that would be a corpus of spaced letters.
    nul = line.find(b"\0")
    if nul >= 0:
        where = f"line {number}, byte {line_start + nul}"
        raise DataError(
            f"{shown(path)} is not text: {where} of the file is NUL; expected UTF-8 text: is it "
            "UTF-16, or compressed?"
        )
    # Only at the beginning of a file is U+FEFF a mark; anywhere else it is a character of the text.
    return text.removeprefix(codecs.BOM_UTF8.decode("utf-8")) if number == 1 else text


def _json_values(path: Path, text_field: str) -> Values:
    """Yield a column of a file with a JSON object on each line.

    Raises:
        DataError: a line is no object, or the first object lacks the column.
    """
    columns_are_known = False
    for line in _lines(path):
        # An empty text is counted as a blank line, which this is.
        if not line.text.strip():
            yield ""
            continue
        row = _parse_json(line, path)
        # Objects need not have the same keys. That the first one lacks the column is a mistake of
        # the one who named it; that a later one does is a row without text, and counted.
        if not columns_are_known:
            _require_column(text_field, list(row), path)
            columns_are_known = True
        yield encodable(row.get(text_field))


def _parse_json(line: Line, path: Path) -> dict[str, object]:
    """Return the object on a line.

    Python's parser counts from the beginning of what it is given, which is a line. The message adds
    where that line is: an editor goes to the one, a program that cuts files to the other.

    >>> _parse_json(Line('{"text": "one"}', number=1, start=0), Path("a.jsonl"))
    {'text': 'one'}
    >>> _parse_json(Line('{"text": tw', number=2, start=16), Path("a.jsonl"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    annotated_mpnet.errors.DataError: 'a.jsonl': line 2, which begins at byte 16, is not JSON ...
    """
    where = f"line {line.number}, which begins at byte {line.start}"
    try:
        row = json.loads(line.text)
    # To Python, a number of 5000 digits is a ValueError of another kind, and a thousand brackets
    # are a recursion that is too deep. To the owner of the file, all are the same: no JSON.
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


def encodable(value: object) -> object:
    r"""Return a value, or None for text with half a surrogate pair: JSON can spell it, UTF-8 not.

    JSON writes characters beyond U+FFFF as two escapes, the halves of UTF-16. A program that cuts
    strings by length may cut between the two, and Python reads the lone half without complaint; the
    error would come later, from the hash or the tokenizer, without line or file.

    >>> [encodable(json.loads(text)) for text in (r'"\ud83d\ude00"', r'"\ud83d"', '""', "3")]
    ['😀', None, '', 3]
    """
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _csv_values(path: Path, text_field: str) -> Values:
    r"""Yield a column of a CSV file, whose first row names the columns.

    A row is not a line: a quoted field may hold line breaks. So the parser is fed lines with their
    ends, and asks for one more as long as a quotation is open.

    >>> lines = ["id,text\n", '1,"two\n', 'lines"\n', "\n", "2\n"]
    >>> list(csv.reader(lines, strict=True))
    [['id', 'text'], ['1', 'two\nlines'], [], ['2']]

    Raises:
        DataError: the file is not CSV, or lacks the column.
    """
    # Both settings are against silence. Without the first, a long document is an error; without
    # `strict`, a quotation that is never closed swallows the rest of the file as one document.
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader((line.text for line in _lines(path)), strict=True)
    try:
        columns = next(reader, None)
        if columns is None:
            return
        _require_column(text_field, columns, path)
        place = columns.index(text_field)
        for row in reader:
            # A blank line is an empty row. One with more or fewer fields has lost a comma, or has
            # one too many in the text: which field is the text then, nobody knows.
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
    """Yield a column of a Parquet file; the other columns are not even read from the disk.

    Raises:
        DataError: the file is damaged, cut off or no Parquet file, or lacks the column.
    """
    row = 0
    try:
        # What columns there are stands at the end of the file. So a file that is cut off has none,
        # and is found out before its first row is used.
        with pa.parquet.ParquetFile(path) as file:
            _require_column(text_field, file.schema_arrow.names, path)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[text_field]):
                yield from batch.column(0).to_pylist()
                row += len(batch)
    # Damage shows as any of these, whichever part of the file it is in. An OSError with a message
    # of the system's is another matter: not the file is at fault, but the way to it.
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
"""How formats with columns are read, by ending: the table that a further format is added to. Such a
reader yields a value for each row, None where there is none, and raises a `DataError` that names
the file and the place in it for whatever is damaged."""

ENDINGS = (".txt", ".txt.gz", *COLUMNS)
"""Endings of the files that a search in a directory takes. A file that is named by itself may have
any other, and is text: `--train-dir corpus.en` means what it says."""


def is_called(path: Path, ending: str) -> bool:
    """Tell whether a file's name has an ending, in capitals or not.

    Not by `Path.suffix`, which knows the last dot only:

    >>> path = Path("Wiki.en.JSONL.GZ")
    >>> path.suffix, is_called(path, ".jsonl.gz"), is_called(path, ".txt.gz")
    ('.GZ', True, False)
    """
    return path.name.lower().endswith(ending)


def has_columns(path: Path) -> bool:
    """Tell whether the text of a file stands in a column, so that --text-field has a say in it."""
    return any(is_called(path, ending) for ending in COLUMNS)


def _require_column(text_field: str, columns: list[str], path: Path) -> None:
    """Raise a `DataError` that lists the columns there are, if the one asked for is not among them.

    There is no guessing ("the only column of strings", "the first one"): a wrong guess trains on
    titles or addresses, and looks like success.
    """
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
    r"""Quote a path so that its name cannot break the line, its last 80 characters at most.

    The end of a path says more than its beginning, so that is what is kept.

    >>> shown(Path("text\nall is well.txt")), len(shown(Path("a" * 500)))
    ("'text\\nall is well.txt'", 82)
    """
    text = str(path)
    return repr(text if len(text) <= 80 else "..." + text[-77:])


def shown_text(text: str) -> str:
    r"""Quote foreign text so that it cannot break the line, its first 80 characters at most.

    >>> shown_text("\x1b[31mred"), len(shown_text("a" * 500))
    ("'\\x1b[31mred'", 82)
    """
    return repr(text if len(text) <= 80 else text[:77] + "...")
