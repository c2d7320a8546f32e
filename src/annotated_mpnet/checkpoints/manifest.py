"""The manifest: what makes a directory a whole checkpoint, and proves that it still is one.

The file formats do not help. A flipped bit in the middle of a tensor is a different, legal number:
0.02 becomes 0.0200001, or 0.01, or 6.8e+36. Of 200 random flips, plain `torch.load` and plain
safetensors let nine in ten pass. So each checkpoint ends with one small file, written last:

    manifest.json
        content
            format_version   a newer one is refused
            run_id           the run that wrote it; no other run may replace or prune it
            created          the only clock: all other files are the same if the run is repeated
            libraries        what wrote it
            files            name -> size in bytes, SHA-256
        sha256               of the content

A checkpoint is *whole* if its manifest is byte for byte what we would write for its content, and if
every file in it has its size and its hash. MPNet-base and AdamW, 1.3 GB, take about a second. Only
then does a parser see the contents, so a safetensors header that claims 2**60 bytes never gets to
ask for memory.

A hash is not a signature: it protects against disks, not against an attacker, who would write a new
one. Against an attacker, nothing here is a pickle and no name may lead out of the directory.
"""

import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec

from annotated_mpnet.errors import CheckpointError, shown
from annotated_mpnet.files.records import (
    Count,
    decode,
    reading,
    regular_size,
    to_json,
)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file."""

    size: Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

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
                raise ValueError(f"file name {shown(name)} leads out of the checkpoint")


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
    if "torch" in sys.modules:
        # With the build: 2.11.0+cu130 computes other numbers than 2.11.0+cpu.
        versions["torch"] = str(sys.modules["torch"].__version__)
    return versions


def write_manifest(
    directory: Path, run_id: str, created: str, known: Mapping[str, FileRecord] | None = None
) -> None:
    """Hash every file under a directory, and write its manifest.

    Args:
        directory: of the checkpoint.
        run_id: of the run.
        created: the time.
        known: files that need not be hashed, by name.
    """
    files = dict(known or {})
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files:
            files[name] = FileRecord(path.stat().st_size, _sha256(path))
    manifest = Manifest(run_id, created, library_versions(), files)
    (directory / MANIFEST).write_bytes(seal(manifest))


def seal(content: object) -> bytes:
    """Return the only bytes of `manifest.json` for a content."""
    digest = hashlib.sha256(to_json(content).encode()).hexdigest()
    return to_json({"content": content, "sha256": digest}).encode()


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest, but not the files that it lists; raises `CheckpointError`."""
    path = directory / MANIFEST
    if not directory.is_dir():
        seen = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {seen}; expected the directory of a checkpoint")
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: not a checkpoint of this program, or incomplete"
        )
    # First the version: another format may be laid out or hashed differently.
    version = decode(path, _OfAnyVersion).content.format_version
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this program reads up to version "
            f"{FORMAT_VERSION}: a newer annotated-mpnet wrote it, upgrade to read it"
        )
    manifest = decode(path, _Sealed).content
    # All bytes, not the values alone: a flip may turn one blank into another.
    if path.read_bytes() != seal(manifest):
        raise CheckpointError(f"{path} does not match its own checksum; it is damaged")
    return manifest


def verify_checkpoint(directory: Path, folder: str = "") -> Manifest:
    """Return the manifest of a checkpoint that is whole, to the bit; raises `CheckpointError`.

    With a folder, only the files in it are verified.
    """
    manifest = read_manifest(directory)
    for name, record in manifest.files.items():
        if not name.startswith(folder):
            continue
        path = directory / name
        with reading(path):
            size = regular_size(path)
            # Not hashed if the size is wrong: it may be a terabyte.
            digest = _sha256(path) if size == record.size else ""
        if size != record.size:
            found = f"{size} bytes, expected {record.size}"
        elif digest != record.sha256:
            found = f"SHA-256 {digest[:12]}..., expected {record.sha256[:12]}..."
        else:
            continue
        raise CheckpointError(f"{path} has {found}; the checkpoint is damaged")
    return manifest


def read_folder(directory: Path, folder: str) -> dict[str, bytes]:
    """Verify and read the files of a folder in a checkpoint; raises `CheckpointError`.

    The rest is not verified, so it takes no time.
    """
    return read_files(directory, verify_checkpoint(directory, f"{folder}/"), folder)


def read_files(directory: Path, manifest: Manifest, folder: str) -> dict[str, bytes]:
    """Read the files of a folder in a checkpoint that is verified already."""
    inside = f"{folder}/"
    return {
        name.removeprefix(inside): (directory / name).read_bytes()
        for name in manifest.files
        if name.startswith(inside)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
