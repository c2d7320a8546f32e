r"""Where the text comes from: whatever yields documents, and can say which ones it will yield.

Packing wants two things of a source, and that is the protocol `DocumentSource`: its documents, in
an order that never changes; and a *fingerprint*, a name for exactly these documents in this order.
Rows that were packed are kept under a name that the fingerprint is part of, so that a second start
need not read the text again; and a run that is resumed compares it, and sees that it is still the
same text.

Here are files on this machine. Others: `streams/hub.py`, datasets; `text/hold_out.py`, parts of other sources;
`streams/eval_samples.py`, a few documents in memory. As only the protocol is asked for, they can be put one
around the other: a downloaded dataset, without what stands in the validation file, without a
hundredth of it.

**Directories** are searched at all depths, in the order of the paths. Hidden files and directories,
files of other formats, and links to directories (which may lead in a circle) are passed over and
counted. What has the name of a text but cannot be one is an error: a named pipe, which would wait
for a writer for ever, or a link to nowhere.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     for name in ("b.txt", "a/2.txt", "a/10.txt", "notes.md", ".git/log.txt"):
...         Path(folder, name).parent.mkdir(exist_ok=True)
...         _ = Path(folder, name).write_text(f"This is {name}.\n")
...     source = LocalFiles.find(Path(folder), flag="--train-dir")
...     before, counts = source.fingerprint, Counts()
...     print(list(source.documents(counts)))
...     print(counts)
...     _ = Path(folder, "b.txt").rename(Path(folder, "c.txt"))
...     print(LocalFiles.find(Path(folder), flag="--train-dir").fingerprint == before)
...     _ = Path(folder, "c.txt").write_text("This is x.txt.\n")
...     print(LocalFiles.find(Path(folder), flag="--train-dir").fingerprint == before)
['This is a/10.txt.', 'This is a/2.txt.', 'This is b.txt.']
3 documents in 3 files; 2 other files skipped
True
False

The order is that of the letters, 10 before 2: what matters is that it is the same on each machine,
which the order in which a file system lists its entries is not.

**Fingerprints** are of contents, not of names, sizes or dates: a directory can be moved and copied,
and an edit that leaves size and date alone is seen. Above, a new name that keeps the order is the
same text, a letter of it another. A file that is read for packing is compared once more when its
end is reached, so that rows never mix two states of a text.

Next: `text/packing.py`.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from annotated_mpnet.errors import DataError
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.file_formats import (
    ENDINGS,
    has_columns,
    is_called,
    read_documents,
    shown,
    shown_text,
    unreadable,
)

__all__ = [
    "Counts",
    "DocumentSource",
    "LocalFiles",
    "find_text_files",
    "fingerprint_files",
    "read_documents",
    "shown",
    "shown_text",
]


class DocumentSource(Protocol):
    """Documents in a fixed order.

    They can be had more than once: to choose what is held out, and to pack what is not.
    """

    @property
    def fingerprint(self) -> str:
        """Name the documents: equal fingerprints mean equal documents in equal order."""

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents, and count what is met.

        Args:
            counts: is added to, while the documents are handed on. Sources around others correct
                it: what one hands on, the next may leave out.

        Raises:
            DataError: the text cannot be read, or is not what the fingerprint says.
        """


@dataclass(frozen=True)
class LocalFiles:
    """The documents of files, one file after the other.

    Nothing is read before it is asked for: the hashes at the first look at the fingerprint, which
    takes a second for 2 GB, the documents while they are handed on.

    Attributes:
        paths: the files, in this order.
        text_field: the column that holds the text, in files with columns.
        skipped_files: what a search for the files passed over, to be counted.
    """

    paths: Sequence[Path]
    text_field: str = "text"
    skipped_files: int = 0

    @classmethod
    def find(cls, path: Path, flag: str, text_field: str = "text") -> "LocalFiles":
        """Return the files that a flag names; see `find_text_files`.

        Raises:
            DataError: there are none.
        """
        counts = Counts()
        return cls(find_text_files(path, flag, counts), text_field, counts.skipped_files)

    @cached_property
    def fingerprint(self) -> str:
        """Hash contents, formats and order of the files, and which column is read.

        Of plain text no column is read, so that --text-field does not make it another text. That a
        file *has* columns does: the same bytes under the name `a.txt` are other documents than
        under `a.jsonl`.
        """
        columns = [has_columns(path) and self.text_field for path in self.paths]
        named = repr([*zip(self._digests, columns, strict=True)])
        return hashlib.sha256(named.encode()).hexdigest()

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents of all files, and count what is met.

        Raises:
            DataError: a file cannot be read or parsed, has changed since it was fingerprinted, or
                all of them together hold no document.
        """
        before = counts.documents + counts.left_out
        counts.skipped_files += self.skipped_files
        for path, digest in zip(self.paths, self._digests, strict=True):
            yield from read_documents(path, counts, self.text_field)
            # Somebody may still be writing it, or `git checkout` another state of it. The rows
            # would be kept under the name of a text that they are not made of.
            if _digest(path) != digest:
                raise DataError(
                    f"{shown(path)} changed while it was read; start again when it is complete"
                )
        # Blank lines only, or empty files. Among others they are no matter; alone they are an empty
        # training text, which is a mistake in a path more often than not.
        if counts.documents + counts.left_out == before:
            others = f" and {len(self.paths) - 1} more files" if len(self.paths) > 1 else ""
            raise DataError(
                f"no text in {shown(self.paths[0])}{others}: {counts}; expected a document on each "
                "line, or in each row"
            )

    @cached_property
    def _digests(self) -> list[str]:
        """The hash of each file, taken once: by it a change is noticed while the object lives."""
        return [_digest(path) for path in self.paths]


def find_text_files(path: Path, flag: str, counts: Counts | None = None) -> list[Path]:
    """Return the files that a flag names, sorted by path.

    A single file is taken as it is: who names it has said that it is text, whatever it is called.

    Args:
        path: one file, whatever its ending, or a directory, searched recursively.
        flag: the flag that named the path, for the message.
        counts: what is passed over in a directory is added to its `skipped_files`.

    Raises:
        DataError: there is no such path, it cannot be searched, or it holds no text file.
    """
    # Sorted as paths, not as strings: part by part, so that the files of a directory stay together
    # ("a/b" before "a-c", although "-" comes before "/").
    if path.is_dir():
        files = sorted(_search(path, counts or Counts()))
        if not files:
            raise DataError(
                f"no text files in {shown(path)} ({flag}); expected files that end in "
                f"{', '.join(ENDINGS)}, at any depth"
            )
        return files
    # A path that is not there and one that is a device are two mistakes, with two ways out.
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


def fingerprint_files(paths: Sequence[Path]) -> str:
    """Return a SHA-256 of the contents of files, in their order.

    It is the hash of the files' hashes, not of their contents behind one another: a line that moves
    from the end of one file to the beginning of the next makes another fingerprint.

    Raises:
        DataError: a file cannot be read.
    """
    return hashlib.sha256(" ".join(map(_digest, paths)).encode()).hexdigest()


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; it takes about a second for 2 GB.

    In portions, whatever the size of the file: memory does not grow with it.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _search(directory: Path, counts: Counts) -> list[Path]:
    """Return the text files at all depths of a directory, in no order; count what is passed over.

    Raises:
        DataError: a directory may not be entered, or what is called a text is no regular file.
    """

    def refuse(error: OSError) -> None:
        # Left to itself, os.walk leaves out what it may not enter, and the run would miss text.
        raise unreadable(directory, error) from error

    found: list[Path] = []
    for parent, directories, names in os.walk(directory, onerror=refuse):
        entered = [name for name in directories if _is_entered(Path(parent, name))]
        texts = [Path(parent, name) for name in names if _is_text(name)]
        counts.skipped_files += len(directories) - len(entered) + len(names) - len(texts)
        # os.walk enters what is left in this very list, hence the assignment into it.
        directories[:] = entered
        for path in texts:
            # Behind links: a link to a file is the file, and linking texts together is usual.
            if not path.is_file():
                raise DataError(
                    f"{shown(path)} is called a text but is no regular file (a pipe, or a link to "
                    "nowhere?); remove or rename it"
                )
        found.extend(texts)
    return found


def _is_entered(directory: Path) -> bool:
    """Tell whether a search goes into a directory: not into `.git`, nor through a link."""
    return not directory.name.startswith(".") and not directory.is_symlink()


def _is_text(name: str) -> bool:
    """Tell whether a search takes a file of this name.

    >>> [_is_text(name) for name in ("a.txt", "A.JSONL.GZ", ".a.txt", "a.zip")]
    [True, True, False, False]
    """
    return not name.startswith(".") and any(is_called(Path(name), ending) for ending in ENDINGS)
