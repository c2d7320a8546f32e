"""The manifest: what makes a directory a whole checkpoint, and shows that it still is one.

The file formats do not help here. A flipped bit in the middle of a tensor is a different, perfectly
legal number: of 200 random flips, plain `torch.load` and plain safetensors let nine in ten pass. A
run goes on with such weights and nobody ever learns why it got worse. So each checkpoint ends with
one small file, written last, that names every other one:

    manifest.json
        content
            format_version   how the directory is laid out; a newer one is refused, not guessed at
            run_id           which run wrote it: nobody else's checkpoint is ever replaced or pruned
            created          the only clock in the checkpoint: all other files are the same, to
                             the byte, whenever the same run is repeated
            libraries        what wrote it
            files            name -> size in bytes, SHA-256
        sha256               of the content, since somebody must watch the watchman

*Whole* means: the manifest is there, it is byte for byte what we would write for its own content,
and every file it names has its size and its hash. Sizes come first, since they cost nothing; then
hashes; only then does a parser see a byte of it. So neither a truncated file nor a header that
claims 2**60 bytes gets as far as asking for memory. A hash is no signature: this guards against
disks, not against an enemy. Against one, there is no pickle here that could run his code.

HF: the Trainer resumes from the directory with the highest number, and checks nothing in it.
fairseq: one `torch.save` file, a pickle, without a hash of its tensors.

Next: `checkpoint.py`, which writes and reads the files that are named here.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.training.strict_json import (
    JsonObject,
    as_count,
    as_text,
    read_json,
    reading,
    regular_size,
    to_json,
)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; `files` maps names such as `tokenizer/vocab.txt`."""

    run_id: str
    created: str
    libraries: dict[str, str]
    files: dict[str, FileRecord]


def library_versions() -> dict[str, str]:
    """Return name -> version of Python and of everything that decides what a run computes."""
    names = ("annotated-mpnet", "datasets", "numpy", "safetensors", "tokenizers", "torch")
    versions = {"python": platform.python_version()}
    for name in (*names, "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8", newline="\n")
    sync(path)


def write_manifest(directory: Path, run_id: str, created: str) -> None:
    """Sync and record every file under a directory, then write its manifest."""
    files = {}
    for path in sorted(directory.rglob("*")):
        sync(path)
        if path.is_file():
            record = FileRecord(path.stat().st_size, _sha256(path))
            files[path.relative_to(directory).as_posix()] = record
    manifest = Manifest(run_id, created, library_versions(), files)
    write_synced(directory / MANIFEST, _encode(_content(manifest)))
    sync(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read and check a checkpoint's manifest, without a look at the files that it names.

    Raises:
        CheckpointError: no directory, no manifest, a damaged one, one of a newer format, or one
            that names files outside of its directory.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no checkpoint: expected a directory")
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: not a checkpoint of this program, or incomplete"
        )
    document = read_json(path)
    with reading(path):
        content = document["content"]
        if not isinstance(content, dict):
            raise TypeError("content is no object")
        # The version comes before the checksum: another format may be summed in another way.
        _check_version(path, content["format_version"])
        # Comparing the bytes with what we would write covers each of them, those between the
        # values too, and through the sum that is part of the text also the values themselves.
        if path.read_bytes() != _encode(content).encode("utf-8"):
            raise ValueError("it does not match its own checksum")
        return _parse(content)


def verify_checkpoint(directory: Path) -> Manifest:
    """Check that a checkpoint is whole, to the bit; return its manifest.

    Files that the manifest does not name are ignored.

    Raises:
        CheckpointError: names the file that is missing, has another size or another hash.
    """
    manifest = read_manifest(directory)
    for name, record in manifest.files.items():
        path = directory / name
        with reading(path):
            size = regular_size(path)
        if size != record.size:
            raise CheckpointError(
                f"{path} has {size} bytes, expected {record.size}; the checkpoint is damaged"
            )
    # Only when all sizes are right: a missing tail is found before gigabytes are hashed.
    for name, record in manifest.files.items():
        path = directory / name
        with reading(path):
            digest = _sha256(path)
        if digest != record.sha256:
            raise CheckpointError(
                f"{path} has SHA-256 {digest[:12]}..., expected {record.sha256[:12]}...; "
                "the checkpoint is damaged"
            )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(manifest: Manifest) -> JsonObject:
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}


def _encode(content: Mapping[str, object]) -> str:
    digest = hashlib.sha256(to_json(content).encode("utf-8")).hexdigest()
    return to_json({"content": content, "sha256": digest})


def _check_version(path: Path, version: object) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this program reads up to version "
            f"{FORMAT_VERSION}: a newer annotated-mpnet wrote it, so upgrade to read it"
        )


def _parse(content: JsonObject) -> Manifest:
    """Build a manifest from parsed JSON; raises `ValueError` or `TypeError`."""
    fields = {"format_version", *(field.name for field in dataclasses.fields(Manifest))}
    if set(content) != fields:
        raise ValueError(f"fields {sorted(set(content) ^ fields)} are unknown or missing")
    files = content["files"]
    if not isinstance(files, dict):
        raise TypeError("files is no object")
    return Manifest(
        run_id=as_text(content["run_id"]),
        created=as_text(content["created"]),
        libraries=_as_versions(content["libraries"]),
        files={_safe_name(name): _record(record) for name, record in files.items()},
    )


def _safe_name(name: str) -> str:
    """Accept a name only if it stays inside the checkpoint, on any system."""
    parts = PurePosixPath(name).parts
    plain = "/".join(parts) == name and not name.startswith("/") and "\\" not in name
    if not plain or not parts or ".." in parts or "\0" in name or ":" in name:
        raise ValueError(f"file name {name!r} leads out of the checkpoint")
    return name


def _record(value: object) -> FileRecord:
    if not isinstance(value, dict) or set(value) != {"size", "sha256"}:
        raise TypeError(f"expected a size and a sha256, found {value!r}")
    if SHA256.fullmatch(as_text(value["sha256"])) is None:
        raise ValueError(f"sha256 is {value['sha256']!r}")
    return FileRecord(as_count(value["size"]), value["sha256"])


def _as_versions(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError(f"expected names and versions, found {value!r}")
    return {name: as_text(version) for name, version in value.items()}
