r"""Where documents come from: `DocumentSource`, and files on this machine.

Packing needs two things of a source: its documents, in an order that never changes, and a
*fingerprint*, a name for exactly these documents in this order. The fingerprint is part of the
cache's key and of what a resumed run compares. Other sources are datasets (`streams/hub.py`), parts
of sources (`text/hold_out.py`) and documents in memory (`streams/eval_samples.py`); they can wrap
one another.

**Directories** are searched at all depths, in the order of the paths. Hidden files and directories,
other formats, and links to directories are skipped and counted; so are runs, checkpoints,
tokenizers and models, whose logs and vocabularies have the endings of texts: a run in the directory
of its text must find the same text when it is resumed. A named pipe or a dangling link with the
name of a text is an error. A dataset that was saved by `save_to_disk` is read as such.

**Fingerprints** are of contents, not of names, sizes or dates. Renaming a file without changing the
order keeps the fingerprint; changing one letter does not:

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

A file is hashed once more when its end is reached, so sequences never mix two states of a text.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from annotated_mpnet.errors import DataError, shown
from annotated_mpnet.text.counts import Counts
from annotated_mpnet.text.file_formats import (
    SEARCHED,
    has_columns,
    is_called,
    read_documents,
    unreadable,
)

__all__ = [
    "Counts",
    "DocumentSource",
    "LocalFiles",
    "find_text_files",
    "fingerprint_files",
    "read_documents",
]


WRITTEN = (
    ("config.toml", "environment.json"),
    ("metrics.jsonl", "environment.json"),
    ("state.json", "manifest.json"),
    ("tokenizer_config.json",),
    ("config.json", "model.safetensors"),
    ("config.json", "pytorch_model.bin"),
)
"""Files that make a directory a run, a checkpoint, a tokenizer, a model."""


class DocumentSource(Protocol):
    """Documents in a fixed order, which can be read more than once."""

    @property
    def fingerprint(self) -> str:
        """Name the documents: equal fingerprints mean equal documents in equal order."""

    @property
    def skipped_files(self) -> int:
        """How many files the search for the documents has skipped."""

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents and update the counts.

        Raises:
            DataError: the text cannot be read, or is not what the fingerprint says.
        """


@dataclass(frozen=True)
class LocalFiles:
    """The documents of files, one file after the other.

    Attributes:
        paths: the files, in this order.
        text_field: the column that holds the text, in files with columns.
        skipped_files: found in the directory and skipped.
        parts: sources that these files were joined from, whose hashes are taken over.
    """

    paths: Sequence[Path]
    text_field: str = "text"
    skipped_files: int = 0
    parts: Sequence["LocalFiles"] = ()

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
        """Hash contents, formats and order of the files, and the column where there are columns."""
        columns = [has_columns(path) and self.text_field for path in self.paths]
        named = repr([*zip(self._digests, columns, strict=True)])
        return hashlib.sha256(named.encode()).hexdigest()

    def documents(self, counts: Counts) -> Iterator[str]:
        """Yield the documents of all files and update the counts.

        Raises:
            DataError: a file cannot be read or parsed, has changed since it was fingerprinted, or
                all of them together hold no document.
        """
        before = counts.documents + counts.left_out
        counts.skipped_files += self.skipped_files
        for path, digest in zip(self.paths, self._digests, strict=True):
            yield from read_documents(path, counts, self.text_field)
            if _digest(path) != digest:
                raise DataError(
                    f"{shown(path)} changed while it was read; start again when it is complete"
                )
        if counts.documents + counts.left_out == before:
            others = f" and {len(self.paths) - 1} more files" if len(self.paths) > 1 else ""
            raise DataError(
                f"no text in {shown(self.paths[0])}{others}: {counts}; expected a document on each "
                "line, or in each row"
            )

    @cached_property
    def _digests(self) -> list[str]:
        if self.parts:
            return [digest for part in self.parts for digest in part._digests]
        return [_digest(path) for path in self.paths]


def find_text_files(path: Path, flag: str, counts: Counts | None = None) -> list[Path]:
    """Return the files that a flag names, sorted by path.

    Args:
        path: a directory, searched recursively, or a file, read as text whatever its extension.
        flag: the flag that named the path, for the message.
        counts: its `skipped_files` is updated.

    Raises:
        DataError: there is no such path, it cannot be searched, or it holds no text file.
    """
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return _saved_dataset(path, flag)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if (each / "state.json").is_file())
        raise DataError(
            f"{flag} {shown(path)} is a saved dataset of several splits; name one of them: "
            f"{shown(', '.join(splits))}"
        )
    if path.is_dir():
        # Sorted as paths, not as strings, so the files of a directory stay together.
        files = sorted(_search(path, counts or Counts()))
        if not files:
            raise DataError(
                f"no text files in {shown(path)} ({flag}); expected files that end in "
                f"{', '.join(SEARCHED)}, compressed or not, at any depth"
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


def fingerprint_files(paths: Sequence[Path]) -> str:
    """Return a SHA-256 of the hashes of files, in their order."""
    return hashlib.sha256(" ".join(map(_digest, paths)).encode()).hexdigest()


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; it takes about a second for 2 GB."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _search(directory: Path, counts: Counts) -> list[Path]:
    """Return the text files at all depths of a directory, unsorted; count what is skipped."""

    def refuse(error: OSError) -> None:
        # By default os.walk silently skips what it may not enter.
        raise unreadable(directory, error) from error

    found: list[Path] = []
    for parent, directories, names in os.walk(directory, onerror=refuse):
        entered = [name for name in directories if _is_entered(Path(parent, name))]
        texts = [
            Path(parent, name) for name in names if _is_text(name) and not _is_ours(name, names)
        ]
        counts.skipped_files += len(directories) - len(entered) + len(names) - len(texts)
        # In place: os.walk enters what is left in this list.
        directories[:] = entered
        for path in texts:
            if not path.is_file():
                raise DataError(
                    f"{shown(path)} has the name of a text but is not a regular file (a pipe, or a "
                    "dangling link?); remove or rename it"
                )
        found.extend(texts)
    return found


def _is_entered(directory: Path) -> bool:
    """Tell whether a search goes into a directory.

    Not into `.git`, nor through a link; nor into what this program or transformers has written.
    """
    if directory.name.startswith(".") or directory.is_symlink():
        return False
    return not any(all((directory / name).exists() for name in names) for names in WRITTEN)


def _is_ours(name: str, beside: list[str]) -> bool:
    """Tell whether a file belongs to the run or tokenizer in the directory that is searched."""
    return (name in ("log.txt", "metrics.jsonl") and "environment.json" in beside) or (
        name in ("vocab.txt", "merges.txt") and "tokenizer_config.json" in beside
    )


def _saved_dataset(directory: Path, flag: str) -> list[Path]:
    """Return the Arrow files of a dataset that `save_to_disk` has written, in their order."""
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        files = [directory / Path(each["filename"]).name for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{flag} {shown(directory)}: state.json is damaged ({shown(repr(error))}); "
            "expected a dataset that `save_to_disk` has written"
        ) from error
    if not files:
        raise DataError(f"{flag} {shown(directory)} is a saved dataset without rows")
    return files


def _is_text(name: str) -> bool:
    """Tell whether a search takes a file of this name.

    >>> [_is_text(name) for name in ("a.txt", "A.JSONL.GZ", ".a.txt", "a.zip")]
    [True, True, False, False]
    """
    return not name.startswith(".") and any(is_called(Path(name), ending) for ending in SEARCHED)
