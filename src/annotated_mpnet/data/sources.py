r"""Where the text comes from: files, and what counts as a document.

The rule fits in a line, and nearly every reader of lines breaks it: **a document ends at `\n`, and
nowhere else**. Python's text mode also ends lines at a lone `\r`; `str.splitlines` at ten more
characters, among them U+2028, which scraped web text is full of. Which documents there are must not
depend on which of these a library happens to use, so the files are read as bytes:

>>> import tempfile
>>> with tempfile.NamedTemporaryFile() as file:
...     _ = file.write(b"\xef\xbb\xbfOne.\r\n\nTwo\xe2\x80\xa8still two.\n")
...     file.flush()
...     list(read_documents(Path(file.name)))
['One.', 'Two\u2028still two.']

A byte order mark at the very beginning and a `\r` before the `\n` belong to the file, not to the
text, and go; a blank line is no document, but is counted; a last line without `\n` is one.

Text that is not UTF-8, or holds NUL bytes (UTF-16, a compressed file, a disk image), stops the run
before it begins, with file, line and byte. Replacing what cannot be decoded would train on question
marks and say nothing; skipping it would lose text and say nothing.

HF: `load_dataset("text")` splits at a lone `\r` too, and annotated-mpnet at whatever
`str.splitlines` knows.

The one seam for other formats is `read_documents`: it alone knows how a file becomes documents, and
`TEXT_SUFFIXES` which files are worth trying.

Next: `packing.py`.
"""

import codecs
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from annotated_mpnet.errors import DataError

TEXT_SUFFIXES = (".txt",)
"""Endings of the files that a search in a directory takes."""


def find_text_files(path: Path, flag: str) -> list[Path]:
    """Return the text files that a flag names, sorted by path.

    Args:
        path: one file, whatever its ending, or a directory, searched recursively. In a directory
            hidden files and directories are skipped, and so is all that is no regular file: a named
            pipe would wait for a writer for ever. Links to directories are not followed.
        flag: the flag that named the path, for the message.

    Raises:
        DataError: there is no such path, it cannot be searched, or it holds no text file.
    """
    if path.is_dir():
        files = sorted(_search(path))
        if not files:
            raise DataError(
                f"no text files in {shown(path)} ({flag}); expected files that end in "
                f"{', '.join(TEXT_SUFFIXES)}, at any depth"
            )
        return files
    if not path.exists():
        raise DataError(
            f"{flag} {shown(path)} does not exist; expected a text file or a directory of them"
        )
    if not path.is_file():
        raise DataError(
            f"{flag} {shown(path)} is neither a regular file nor a directory; expected a text "
            "file or a directory of them"
        )
    return [path]


@dataclass
class Counts:
    """What a reader has met so far; it counts as it goes.

    Attributes:
        documents: documents that were yielded.
        blank_lines: lines that were skipped because nothing was on them.
    """

    documents: int = 0
    blank_lines: int = 0


def read_documents(path: Path, counts: Counts | None = None) -> Iterator[str]:
    """Yield the documents of a file.

    Args:
        path: a UTF-8 text file, one document per line.
        counts: is added to, where the caller wants to know.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or holds NUL bytes.
    """
    counts = counts or Counts()
    line_start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                document = _decode(line, path, number, line_start)
                line_start += len(line)
                if document.strip():
                    counts.documents += 1
                    yield document
                else:
                    counts.blank_lines += 1
    except OSError as error:
        raise _unreadable(path, error) from error


def fingerprint_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the sizes and contents of files, in their order.

    Names are left out, so that a directory can be moved. Everything is read: sizes and dates do
    not notice an edit that keeps them, and SHA-256 takes about a second for 2 GB.

    Raises:
        DataError: a file cannot be read.
    """
    all_files = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                all_files.update(f"{file.tell()} {digest}\n".encode())
        except OSError as error:
            raise _unreadable(path, error) from error
    return all_files.hexdigest()


def _search(directory: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        # os.walk would leave out what it may not enter, and the run would miss text.
        raise _unreadable(directory, error) from error

    found: list[Path] = []
    for parent, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = [name for name in directories if not name.startswith(".")]
        texts = (
            Path(parent, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(TEXT_SUFFIXES)
        )
        found.extend(path for path in texts if path.is_file())
    return found


def _decode(line: bytes, path: Path, number: int, line_start: int) -> str:
    """Decode a line; `line_start` is where it begins in the file, in bytes."""
    try:
        document = line.decode("utf-8")
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
    if number == 1:
        document = document.removeprefix(codecs.BOM_UTF8.decode("utf-8"))
    return document.removesuffix("\n").removesuffix("\r")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{shown(path)} cannot be read: {error.strerror or error}; expected a readable text file"
    )


def shown(path: Path) -> str:
    """Quote a path so that its name cannot break the line, its last 80 characters at most."""
    text = str(path)
    return repr(text if len(text) <= 80 else "..." + text[-77:])
