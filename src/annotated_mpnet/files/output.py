"""Where a command may write its directory, and what it may replace there.

A slip of `--output` must not cost a home directory, so what is there decides:

    what is there                                neither flag   --overwrite
    -------------------------------------------  -------------  -----------
    nothing, or an empty directory               written        written
    what this command writes, and nothing else   refused        replaced
    anything else in it, also hidden files       refused        refused
    a file, a link that leads to any of these    refused        refused
    a mount point, the current directory         (1)            refused

(1) The current directory is filled if it is empty; renaming would leave a shell in a deleted one. A
    mount point cannot be renamed.

A directory that holds what the command reads, and any place inside a checkpoint, are refused too.
Links are followed, so no name gets around this.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from annotated_mpnet.errors import ConfigError, WriteError, shown
from annotated_mpnet.files.atomic import beside, replacing

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt "
    "vocab.json merges.txt spiece.model sentencepiece.bpe.model tokenizer.model chat_template.jinja"
)
"""What versions of transformers write for tokenizers of all kinds."""


@dataclass(frozen=True)
class Kind:
    """What a command writes.

    Attributes:
        name: for messages.
        decisive: the file without which a directory is not one of these.
        files: all that may be in it.
        directories: the names of those that may be in it, with wildcards.
    """

    name: str
    decisive: str
    files: str
    directories: str = ""

    def foreign_in(self, directory: Path) -> list[str]:
        """Return the names in a directory that this command would not have written, sorted."""
        return sorted(
            path.name
            for path in directory.iterdir()
            if path.is_symlink()
            or not (path.is_dir() or path.is_file())
            or not any(
                fnmatchcase(path.name, each)
                for each in (self.directories if path.is_dir() else self.files).split()
            )
        )


TOKENIZER = Kind("a tokenizer", "tokenizer.json", TOKENIZER_FILES)
HUGGING_FACE_MODEL = Kind(
    "a Hugging Face model",
    "config.json",
    f"config.json model.safetensors pytorch_model.bin README.md {TOKENIZER_FILES} "
    "annotated_mpnet.json modules.json config_sentence_transformers.json sentence_*_config.json",
    directories="[0-9]_[A-Z]*",
)


@contextmanager
def output_directory(
    output: Path, kind: Kind, *, overwrite: bool, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yield an empty directory that takes the name of `output` at the end, complete or not at all.

    Args:
        output: as the user wrote it.
        kind: what will be in it.
        overwrite: replace an older one.
        inputs: what the command reads.

    Raises:
        ConfigError: refused by the table above. Nothing was changed.
        WriteError: full disk, no permission. Nothing was left behind.
    """
    with write_errors(output):
        target = Path(os.path.realpath(output))
        refuse_to_replace(output, kind, overwrite=overwrite, inputs=inputs)
        with replacing(target) as staging:
            yield staging
            # Once more: learning may have taken an hour.
            _refuse_contents(target, kind, overwrite)


def refuse_to_replace(
    output: Path, kind: Kind, *, overwrite: bool, inputs: Iterable[Path] = ()
) -> None:
    """Raise a `ConfigError` if a command must not write its directory there."""
    target = Path(os.path.realpath(output))
    for source in map(Path, map(os.path.realpath, inputs)):
        if target == source or target in source.parents:
            raise ConfigError(
                f"{shown(output)} is or holds {shown(source)}, which is read; choose another "
                "directory"
            )
    for parent in target.parents:
        if all(os.path.lexists(parent / name) for name in ("manifest.json", "state.json")):
            raise ConfigError(
                f"{shown(output)} is inside the checkpoint {shown(parent)}; choose a directory "
                "outside"
            )
    if os.path.ismount(target):
        raise ConfigError(
            f"{shown(output)} is a mount point, which cannot be replaced; name a directory in it"
        )
    # `lexists`: a dangling link is in the way too.
    if os.path.lexists(output) and not os.path.isdir(target):
        raise ConfigError(f"{shown(output)} is a file; expected a directory: choose another name")
    _refuse_contents(target, kind, overwrite)
    if os.path.islink(output) and os.path.isdir(target) and os.listdir(target):
        raise ConfigError(
            f"{shown(output)} is a link; to replace the directory that it leads to, name that one"
        )
    # What a killed process left over will be deleted, so it must be ours as well.
    for leftover in beside(target):
        if os.path.isdir(leftover):
            _refuse_foreign(leftover, kind.foreign_in(leftover), kind)


def _refuse_contents(target: Path, kind: Kind, overwrite: bool) -> None:
    if not os.path.isdir(target) or not os.listdir(target):
        return
    if not overwrite:
        raise ConfigError(
            f"{shown(target)} is not empty; nothing was written. Choose another directory, or "
            "replace what is there with --overwrite"
        )
    foreign = kind.foreign_in(target)
    # A file called vocab.txt alone may be anything.
    if not os.path.isfile(target / kind.decisive):
        foreign = sorted(os.listdir(target))
    _refuse_foreign(target, foreign, kind)
    if os.path.samefile(target, os.curdir):
        raise ConfigError(
            f"{shown(target)} is the current directory, which cannot be replaced from inside; "
            "start the command in another one"
        )


def _refuse_foreign(directory: Path, foreign: list[str], kind: Kind) -> None:
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"{shown(directory)} holds something other than {kind.name}, which would be deleted: "
            f"{', '.join(map(shown, foreign[:3]))}{more}; choose another directory, or empty it "
            "yourself"
        )


def errno_of(error: Exception) -> int | None:
    """Return the errno of a failed write; None if the error is a bug.

    safetensors and tokenizers write in Rust and give it in the text of their exceptions only.

    >>> full = Exception("Error while serializing: I/O error: No space left (os error 28)")
    >>> errno_of(OSError(28, "No space left")), errno_of(full), errno_of(KeyError())
    (28, 28, None)
    """
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os error (\d+)", str(error))
    return None if number is None else int(number[1])


@contextmanager
def write_errors(output: Path) -> Iterator[None]:
    """Turn a failed write into a `WriteError`, and nothing else."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and errno_of(error) is None:
            raise
        raise WriteError(
            f"{shown(output)} could not be written: {shown(str(error))}; nothing was left behind. "
            "Free some space or fix this, or choose another directory"
        ) from error
