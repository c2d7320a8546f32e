"""The manifest: what makes a directory a whole checkpoint, and shows that it still is one.

The file formats do not help here. A flipped bit in the middle of a tensor is a different, perfectly
legal number. Take a weight of 0.02, which float32 writes as a sign, 8 bits of exponent and 23 of
mantissa, and flip one bit of it, from the lowest to the highest of the exponent:

>>> import struct
>>> (bits,) = struct.unpack("<I", struct.pack("<f", 0.02))
>>> for place in (0, 22, 23, 30):
...     (weight,) = struct.unpack("<f", struct.pack("<I", bits ^ 1 << place))
...     print(place, f"{weight:.4g}")
0 0.02
22 0.02781
23 0.01
30 6.806e+36

Most flips change little, a few change everything, and the last of these is not even infinite. Of
200 random flips, plain `torch.load` and plain safetensors let nine in ten pass. A run goes on with
such weights and nobody ever learns why it got worse. So each checkpoint ends with one small file,
written last, that names every other one:

    manifest.json
        content
            format_version   how the directory is laid out; a newer one is refused, not guessed at
            run_id           which run wrote it: nobody else's checkpoint is ever replaced or pruned
            created          the only clock in the checkpoint: all other files are the same, to
                             the byte, whenever the same run is repeated
            libraries        what wrote it
            files            name -> size in bytes, SHA-256
        sha256               of the content, since somebody must watch the watchman

Here is a small one, with a single, empty file; its hash is the well-known hash of nothing:

>>> files = {"state.json": FileRecord(0, hashlib.sha256(b"").hexdigest())}
>>> created = "2026-01-31T12:00:00+00:00"
>>> print(_encode(_content(Manifest("0123", created, {"torch": "2.13.0"}, files))), end="")
{
  "content": {
    "created": "2026-01-31T12:00:00+00:00",
    "files": {
      "state.json": {
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "size": 0
      }
    },
    "format_version": 1,
    "libraries": {
      "torch": "2.13.0"
    },
    "run_id": "0123"
  },
  "sha256": "70f4620297ffaf8ae08fdca6021b75bdb488fe8306819fbe885c9fea4e5b8343"
}

*Whole* means: the manifest is there, it is byte for byte what we would write for its own content,
and every file it names has its size and its hash. What costs least is looked at first:

    1  is there a manifest, and is it its own?    a few thousand bytes
    2  has every file its size?                   one system call a file; finds each truncation
    3  has every file its hash?                   every byte is read, once, 256 KB in memory
    4  a parser sees the contents                 and may trust the header of a safetensors file

So neither a truncated file nor a header that claims 2**60 bytes gets as far as asking for memory.
Step 3 is the price of all this: 1.3 GB for MPNet-base with its optimizer, about a second, and the
file is read for loading anyway.

Written last, the manifest also says that the writing came to its end. There is no second marker
that could disagree with it: no manifest, no checkpoint.

A hash is no signature: this guards against disks, not against an enemy, who would write a new one.
Against him, there is no pickle here that could run his code, and no name that leads out of the
directory.

HF: the Trainer resumes from the directory with the highest number, and checks nothing in it.
fairseq: one `torch.save` file, a pickle, without a hash of its tensors.

Next: `checkpoints/checkpoint.py`, which writes and reads the files that are named here.
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

from annotated_mpnet.checkpoints.strict_json import (
    JsonObject,
    as_count,
    as_text,
    read_json,
    reading,
    regular_size,
    to_json,
)
from annotated_mpnet.errors import CheckpointError

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
    """The content of `manifest.json`.

    Attributes:
        run_id: the run that wrote the checkpoint.
        created: when it was sealed, ISO 8601; the only thing here that no seed decides.
        libraries: name -> version, of what wrote it.
        files: what there must be, under names such as `tokenizer/vocab.txt`.
    """

    run_id: str
    created: str
    libraries: dict[str, str]
    files: dict[str, FileRecord]


def library_versions() -> dict[str, str]:
    """Return name -> version of Python and of everything that decides what a run computes.

    For the record: nothing is compared. Of all that may differ between two runs that should be the
    same, this is what cannot be reconstructed afterwards.
    """
    names = ("annotated-mpnet", "datasets", "numpy", "safetensors", "tokenizers", "torch")
    versions = {"python": platform.python_version()}
    for name in (*names, "transformers"):
        # By what is installed, not by importing: `__version__` of all these would cost seconds.
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk itself.

    A write returns when the kernel has the bytes in memory, and `close` waits for nothing. They are
    two things, and need a sync each: the contents of a file, and the name of it in its directory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk; `\n` ends a line on any system.

    What a full disk makes of it, an `OSError`, is left to the caller, who knows what was to be
    saved. Its name is not on the disk yet: that is the directory's business.
    """
    path.write_text(text, encoding="utf-8", newline="\n")
    sync(path)


def write_manifest(directory: Path, run_id: str, created: str) -> None:
    """Sync and record every file under a directory, then write its manifest.

    Args:
        directory: a checkpoint under its temporary name; its tokenizer is a directory of its own.
        run_id: the run's.
        created: when, ISO 8601. An argument, so that nothing else in here knows a clock.

    Raises:
        OSError: full disk, lost permission.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        # Directories too: the names of the tokenizer's files are contents of theirs.
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
    # The three ways not to be a checkpoint get a sentence each: they are what a user meets who
    # gives a wrong path, and "cannot be read" would send him to look for a broken disk.
    path = directory / MANIFEST
    if not directory.is_dir():
        seen = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {seen}; expected the directory of a checkpoint")
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
        # values too, and through the sum that is part of the text also the values themselves. A
        # sum over the parsed values alone would let a flip turn one blank into another.
        if path.read_bytes() != _encode(content).encode("utf-8"):
            raise ValueError("it does not match its own checksum")
        return _parse(content)


def verify_checkpoint(directory: Path) -> Manifest:
    """Check that a checkpoint is whole, to the bit; return its manifest.

    Files that the manifest does not name are ignored: a note that somebody put there does no harm,
    since nothing is ever read that is not named.

    Raises:
        CheckpointError: names the file that is missing, has another size or another hash.
    """
    manifest = read_manifest(directory)
    # Opening nothing yet. `regular_size` also refuses what only has the name of a file: a
    # directory, or a FIFO, which would keep the next step waiting for ever.
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
    # In pieces: a checkpoint may be larger than the memory that is left.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(manifest: Manifest) -> JsonObject:
    """Return what is summed. The version is in it: a flip must not make a file an older one."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}


def _encode(content: Mapping[str, object]) -> str:
    """Return the text of `manifest.json` for a content, of which there is only one (`to_json`)."""
    digest = hashlib.sha256(to_json(content).encode("utf-8")).hexdigest()
    return to_json({"content": content, "sha256": digest})


def _check_version(path: Path, version: object) -> None:
    """Refuse a newer format by name, and anything that is no version as damage."""
    # `type`, since True would count as version 1.
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this program reads up to version "
            f"{FORMAT_VERSION}: a newer annotated-mpnet wrote it, so upgrade to read it"
        )


def _parse(content: JsonObject) -> Manifest:
    """Build a manifest from parsed JSON; raises `ValueError` or `TypeError`.

    Its checksum is right by now, and still nothing is taken on trust: whoever writes a manifest by
    hand, with the right sum, gets an error with a name in it and not a strange one further on.
    """
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
    """Accept a name only if it stays inside the checkpoint, on any system.

    What a name means is the system's business: `\\` separates on Windows, `:` names a drive there,
    and a NUL ends a name in C. None of ours has any of them, so that none is allowed anywhere.

    >>> _safe_name("tokenizer/vocab.txt")
    'tokenizer/vocab.txt'
    >>> _safe_name("tokenizer/../../../etc/passwd")
    Traceback (most recent call last):
        ...
    ValueError: file name 'tokenizer/../../../etc/passwd' leads out of the checkpoint

    Raises:
        ValueError: it leads out, or might.
    """
    # Equal to its own parts: no doubled or trailing slash, no `.`, one spelling for each file.
    parts = PurePosixPath(name).parts
    plain = "/".join(parts) == name and not name.startswith("/") and "\\" not in name
    if not plain or not parts or ".." in parts or "\0" in name or ":" in name:
        raise ValueError(f"file name {name!r} leads out of the checkpoint")
    return name


def _record(value: object) -> FileRecord:
    """Build a record from parsed JSON; raises `ValueError` or `TypeError`."""
    if not isinstance(value, dict) or set(value) != {"size", "sha256"}:
        raise TypeError(f"expected a size and a sha256, found {value!r}")
    if SHA256.fullmatch(as_text(value["sha256"])) is None:
        raise ValueError(f"sha256 is {value['sha256']!r}")
    return FileRecord(as_count(value["size"]), value["sha256"])


def _as_versions(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError(f"expected names and versions, found {value!r}")
    return {name: as_text(version) for name, version in value.items()}
