"""The manifest: what makes a directory a whole checkpoint, and proves that it still is one.

The file formats do not help. A flipped bit in the middle of a tensor is a different, legal number:
0.02 becomes 0.0200001, or 0.01, or 6.8e+36. Of 200 random flips, plain `torch.load` and plain
safetensors let nine in ten pass, and a run that resumes with such weights just gets worse. So each
checkpoint ends with one small file, written last, which lists all others:

    manifest.json
        content
            format_version   a newer one is refused
            run_id           the run that wrote it; no other run may replace or prune it
            created          the only clock: all other files have the same bytes whenever the same
                             run is repeated
            libraries        what wrote it
            files            name -> size in bytes, SHA-256
        sha256               of the content

A checkpoint is *whole* if its manifest is there and byte for byte what we would write for its own
content, and if every file it lists has its size and its hash. The cheap checks come first:

    1  the manifest      a few thousand bytes
    2  all sizes         one system call per file; finds every truncation
    3  all hashes        every byte is read once: about a second for 1.3 GB (MPNet-base and AdamW)

Only then does a parser see the contents, so a safetensors header that claims 2**60 bytes never gets
to ask for memory. Since it is written last, the manifest also says that the checkpoint is complete.

A hash is not a signature: it protects against disks, not against an attacker, who would write a new
one. Against an attacker, nothing here is a pickle and no name may lead out of the directory.
"""

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec

from annotated_mpnet.checkpoints.records import (
    Count,
    read_small,
    reading,
    regular_size,
    short,
    to_json,
)
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.files.atomic import sync

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; see above.

    >>> Manifest("0123", "", {}, {"tokenizer/../../../etc/passwd": FileRecord(0, "")})
    Traceback (most recent call last):
    ValueError: file name 'tokenizer/../../../etc/passwd' leads out of the checkpoint
    """

    run_id: str
    created: str
    libraries: dict[str, str]
    files: dict[str, FileRecord]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in self.files:
            # One spelling per file, and nothing that Windows reads as a separator or a drive.
            parts = PurePosixPath(name).parts
            plain = parts and "/".join(parts) == name and not name.startswith("/")
            if not plain or ".." in parts or any(sign in name for sign in "\\:\0"):
                raise ValueError(f"file name {short(name)} leads out of the checkpoint")


class _Sealed(msgspec.Struct):
    content: Manifest
    sha256: str


class _Version(msgspec.Struct):
    format_version: Annotated[int, msgspec.Meta(ge=1)]


class _OfAnyVersion(msgspec.Struct):
    content: _Version


def library_versions() -> dict[str, str]:
    """Return name -> version of Python and of the libraries that decide what a run computes."""
    versions = {"python": platform.python_version()}
    names = ("annotated-mpnet", "datasets", "numpy", "safetensors", "tokenizers", "torch")
    for name in (*names, "transformers"):
        # Without importing them: that would cost seconds.
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def write_manifest(directory: Path, run_id: str, created: str) -> None:
    """Sync and hash every file under a directory, then write its manifest.

    Args:
        directory: a checkpoint under its temporary name.
        run_id: the run's.
        created: when, ISO 8601.

    Raises:
        OSError: full disk, lost permission.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        # Directories too: the names of the tokenizer's files are stored in theirs.
        sync(path)
        if path.is_file():
            record = FileRecord(path.stat().st_size, _sha256(path))
            files[path.relative_to(directory).as_posix()] = record
    manifest = Manifest(run_id, created, library_versions(), files)
    (directory / MANIFEST).write_bytes(seal(manifest))
    sync(directory / MANIFEST)
    sync(directory)


def seal(content: object) -> bytes:
    """Return the only bytes of `manifest.json` for a content."""
    digest = hashlib.sha256(to_json(content).encode()).hexdigest()
    return to_json({"content": content, "sha256": digest}).encode()


def read_manifest(directory: Path) -> Manifest:
    """Read and check a checkpoint's manifest, but not the files that it lists.

    Raises:
        CheckpointError: no directory, no manifest, or one that is damaged, of a newer format, or
            with file names that lead out of the directory.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        seen = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {seen}; expected the directory of a checkpoint")
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: not a checkpoint of this program, or incomplete"
        )
    with reading(path):
        text = read_small(path)
        # First the version: another format may be laid out or hashed differently.
        version = msgspec.json.decode(text, type=_OfAnyVersion).content.format_version
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}; this program reads up to version "
                f"{FORMAT_VERSION}: a newer annotated-mpnet wrote it, upgrade to read it"
            )
        manifest = msgspec.json.decode(text, type=_Sealed).content
        # Of all the bytes, not of the values alone: a flip may turn one blank into another.
        if text != seal(manifest):
            raise ValueError("it does not match its own checksum")
    return manifest


def verify_checkpoint(directory: Path) -> Manifest:
    """Check that a checkpoint is whole, to the bit; return its manifest.

    Files that the manifest does not list are ignored, and never read.

    Raises:
        CheckpointError: names the file that is missing or has another size or hash.
    """
    manifest = read_manifest(directory)
    # All sizes first: a truncated file is found before gigabytes are hashed.
    for name, record in manifest.files.items():
        with reading(directory / name):
            size = regular_size(directory / name)
        if size != record.size:
            raise CheckpointError(
                f"{directory / name} has {size} bytes, expected {record.size}; the checkpoint is "
                "damaged"
            )
    for name, record in manifest.files.items():
        with reading(directory / name):
            digest = _sha256(directory / name)
        if digest != record.sha256:
            raise CheckpointError(
                f"{directory / name} has SHA-256 {digest[:12]}..., expected "
                f"{record.sha256[:12]}...; the checkpoint is damaged"
            )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
