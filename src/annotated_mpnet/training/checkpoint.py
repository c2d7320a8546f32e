"""Checkpoints: how a run survives its own death.

A checkpoint is a directory, and everything in it is plain tensors, JSON and text:

    checkpoint2500/
        model.safetensors      the network, under fairseq's names
        optimizer.safetensors  AdamW's two means and step counts (absent: export only)
        state.json             TrainState: where the run stands, and what it must not change
        config.json            ModelConfig: the network in plain numbers
        stream.json, .safetensors   where a streamed dataset stands (absent for local files)
        tokenizer/             so that the directory is enough to go on, or to export
        manifest.json          sizes and hashes of all of it, written last (`manifest.py`)

State is so small because nothing random has a history (`randomness.py`): the number of the next
update says which batch, masks and dropout come next. No generator is saved. Only a stream has a
past, since nobody can jump to its millionth row: its position, and the rows that wait in its
shuffle buffer, are saved as they are (`data/streams.py`).

Saving is a protocol of which every step may be the last one that happens:

    write    .tmp-checkpoint2500/, every file fsynced       a stale .tmp- is deleted at the start
    seal     its manifest.json, fsynced                     still a .tmp-
    publish  rename .tmp-checkpoint2500 -> checkpoint2500   whole: a rename happens or does not
    sync     the parent directory                           from here on a power cut cannot undo it
    (only now does the caller hear of it, and prunes)

A name that is taken, because best_checkpoint gets better or because a run that fell back to an
older checkpoint passes here again, first steps aside to `.old-checkpoint2500`. Killed between the
two renames, the directory has the old one under that name, and `recover` renames it back.

Loading reads nothing that `verify_checkpoint` has not vouched for, and refuses weights that are
not numbers.

fairseq: `torch.save`, so a pickle that runs code when it is loaded.

Next: `retention.py`, the checkpoints of one directory; `run_directory.py`; `resume.py`.
"""

import dataclasses
import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from annotated_mpnet.config import ModelConfig
from annotated_mpnet.errors import CheckpointError, WriteError
from annotated_mpnet.training.manifest import (
    read_manifest,
    sync,
    verify_checkpoint,
    write_manifest,
)
from annotated_mpnet.training.strict_json import (
    as_count,
    as_number,
    read_json,
    reading,
    short,
    to_json,
)

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
CONFIG = "config.json"
STREAM = "stream.json"
STREAM_TENSORS = "stream.safetensors"
TOKENIZER = "tokenizer"
BEST = "best_checkpoint"

NUMBERED = re.compile(r"checkpoint(0|[1-9][0-9]{0,17})")
TEMPORARY = ".tmp-"
REPLACED = ".old-"

IdentityValue = str | int | float
StreamParts = tuple[Mapping[str, object], Mapping[str, Tensor]]
"""A stream's state as what JSON can hold, and tensors."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that resumes, but for the tensors."""

    update: int
    """Updates done: the number, counted from 0, of the update that comes next."""
    tokens_seen: int
    """Tokens trained on so far, padding not counted."""
    predicted_seen: int
    """Predicted tokens so far."""
    best_valid_bits: float | None
    """Lowest validation loss so far, bits per predicted token; None before the first one."""
    identity: dict[str, IdentityValue]
    """What must be the same on resume (data, seed, batch, ...): see `compare_identity`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory."""

    run_id: str
    state: TrainState
    model_config: ModelConfig
    model_tensors: Mapping[str, Tensor]
    optimizer_tensors: Mapping[str, Tensor] | None
    """None: saved without, for export only; or not asked for."""
    stream: StreamParts | None = None
    """Where the stream of training text stands; None for text that has no past."""


def checkpoint_name(update: int) -> str:
    """Return the name of the checkpoint after so many updates.

    >>> checkpoint_name(2500)
    'checkpoint2500'
    """
    return f"checkpoint{update}"


def save_checkpoint(
    directory: Path, name: str, checkpoint: Checkpoint, save_tokenizer: Callable[[Path], None]
) -> Path:
    """Save a checkpoint under a run's directory; when this returns, it is on the disk.

    Args:
        directory: the run's directory; it must exist.
        name: `checkpoint_name(update)` or `BEST`. A checkpoint of this run that has the name is
            replaced; a damaged one is kept as `NAME.damaged`.
        checkpoint: what to save. The same tensors give the same bytes, in any run.
        save_tokenizer: called with an existing, empty directory to fill.

    Raises:
        WriteError: full disk, lost permission. The temporary directory is removed and all earlier
            checkpoints are as they were.
        CheckpointError: the name is taken by another run.
    """
    target = directory / name
    temporary = directory / f"{TEMPORARY}{name}"
    _refuse_to_replace_foreign(target, checkpoint.run_id)
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        _write(temporary, checkpoint, save_tokenizer)
        _publish(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        number = _system_error(error)
        if number is None:
            raise
        raise WriteError(_explain(target, checkpoint, number)) from error
    return target


def load_checkpoint(directory: Path, *, with_optimizer: bool = True) -> Checkpoint:
    """Verify and read a checkpoint; its tensors are on the CPU.

    Args:
        directory: the checkpoint.
        with_optimizer: False for export, which needs the network only.

    Raises:
        CheckpointError: damaged, incomplete, of a newer format, with weights that are not finite;
            or without the optimizer's state, which is never replaced by an empty one: AdamW
            without its means takes steps of full size in every direction.
    """
    manifest = verify_checkpoint(directory)
    for name in (MODEL, STATE, CONFIG):
        if name not in manifest.files:
            raise CheckpointError(f"{directory / name} is missing; the checkpoint is incomplete")
    state = read_state(directory / STATE)
    numbered = NUMBERED.fullmatch(directory.name)
    if numbered is not None and int(numbered[1]) != state.update:
        raise CheckpointError(
            f"{directory / STATE} says update {state.update}, expected {numbered[1]} by the "
            "directory's name: it was renamed, or belongs to another checkpoint"
        )
    optimizer_tensors = None
    if with_optimizer:
        if OPTIMIZER not in manifest.files:
            raise CheckpointError(
                f"{directory} has no {OPTIMIZER}: it was saved with --no-save-optimizer-state and "
                "cannot be resumed, only exported with convert-to-hf"
            )
        optimizer_tensors = _read_tensors(directory / OPTIMIZER)
        if state.update > 0 and not optimizer_tensors:
            raise CheckpointError(f"{directory / OPTIMIZER} is empty after update {state.update}")
    return Checkpoint(
        run_id=manifest.run_id,
        state=state,
        model_config=_read_config(directory / CONFIG),
        model_tensors=_read_tensors(directory / MODEL),
        optimizer_tensors=optimizer_tensors,
        stream=_read_stream(directory) if STREAM in manifest.files else None,
    )


def _write(directory: Path, checkpoint: Checkpoint, save_tokenizer: Callable[[Path], None]) -> None:
    # mkdir and open follow the umask, unlike tempfile, which makes everything private.
    directory.mkdir()
    (directory / TOKENIZER).mkdir()
    save_tokenizer(directory / TOKENIZER)
    state = directory / STATE
    state.write_text(to_json(dataclasses.asdict(checkpoint.state)), encoding="utf-8")
    config = to_json(dataclasses.asdict(checkpoint.model_config))
    (directory / CONFIG).write_text(config, encoding="utf-8")
    _write_tensors(directory / MODEL, checkpoint.model_tensors)
    if checkpoint.optimizer_tensors is not None:
        _write_tensors(directory / OPTIMIZER, checkpoint.optimizer_tensors)
    if checkpoint.stream is not None:
        plain, tensors = checkpoint.stream
        (directory / STREAM).write_text(to_json(plain), encoding="utf-8")
        _write_tensors(directory / STREAM_TENSORS, tensors)
    # safetensors gives its files mode 0600, so that a colleague could not read them. The mode that
    # the umask wants is that of any file made by open(); asking the umask itself would change it
    # for a moment, in all threads.
    for path in directory.glob("*.safetensors"):
        path.chmod(state.stat().st_mode)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(directory, checkpoint.run_id, now)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors orders by dtype and name, and without metadata its header has no other freedom:
    # equal tensors give equal bytes.
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _publish(temporary: Path, target: Path) -> None:
    former = None
    if os.path.lexists(target):
        former = _place_aside(target)
        os.rename(target, former)
    try:
        os.rename(temporary, target)
    except OSError:
        if former is not None:
            os.rename(former, target)
        raise
    sync(target.parent)
    if former is not None and former.name.startswith(REPLACED):
        shutil.rmtree(former, ignore_errors=True)


def _place_aside(target: Path) -> Path:
    """Return where a taken name steps aside: to be deleted if it is ours, else to be kept."""
    if owner(target) is not None:
        former = target.with_name(f"{REPLACED}{target.name}")
        if former.exists():
            shutil.rmtree(former)
        return former
    former, number = target.with_name(f"{target.name}.damaged"), 1
    while os.path.lexists(former):
        number += 1
        former = target.with_name(f"{target.name}.damaged{number}")
    return former


def owner(path: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if its manifest does not say."""
    try:
        return read_manifest(path).run_id
    except CheckpointError:
        return None


def _refuse_to_replace_foreign(target: Path, run_id: str) -> None:
    other = owner(target)
    if other is not None and other != run_id:
        raise CheckpointError(
            f"{target} belongs to another run ({short(other)}, expected {short(run_id)}) and was "
            "left as it is; move it away, or choose another --checkpoint-dir, and --resume"
        )


def _system_error(error: Exception) -> int | None:
    """Return the errno of a failed write; None if the error is no failed write, but a bug.

    safetensors and tokenizers write in Rust and tell only in their text, each with its own class.
    """
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os error (\d+)", str(error))
    return None if number is None else int(number[1])


def _explain(target: Path, checkpoint: Checkpoint, number: int) -> str:
    tensors = [*checkpoint.model_tensors.values(), *(checkpoint.optimizer_tensors or {}).values()]
    # The rest, tokenizer and JSON, is about a megabyte.
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6 + 1
    message = f"{target} could not be written: {os.strerror(number)}; needed {needed:.0f} MB"
    try:
        message += f", free {shutil.disk_usage(target.parent).free / 1e6:.0f} MB"
    except OSError:
        message += f", and {target.parent} cannot be asked what is free"
    remedy = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return f"{message}; earlier checkpoints are intact: {remedy} and go on with --resume"


def read_state(path: Path) -> TrainState:
    """Read a state, unverified; raises `CheckpointError` for what cannot be one."""
    values = read_json(path)
    with reading(path):
        _expect_fields(values, TrainState)
        identity, best = values["identity"], values["best_valid_bits"]
        if not isinstance(identity, dict):
            raise TypeError("identity is no object")
        return TrainState(
            update=as_count(values["update"]),
            tokens_seen=as_count(values["tokens_seen"]),
            predicted_seen=as_count(values["predicted_seen"]),
            best_valid_bits=None if best is None else as_number(best),
            identity={
                name: value if isinstance(value, str) else _plain_number(value)
                for name, value in identity.items()
            },
        )


def _read_config(path: Path) -> ModelConfig:
    values = read_json(path)
    with reading(path):
        _expect_fields(values, ModelConfig)
        for field in dataclasses.fields(ModelConfig):
            value, expected = values[field.name], type(field.default)
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise TypeError(f"{field.name} is {value!r}, expected {expected.__name__}")
        return ModelConfig(**values)  # type: ignore[arg-type]


def _expect_fields(values: Mapping[str, object], kind: type[TrainState | ModelConfig]) -> None:
    expected = {field.name for field in dataclasses.fields(kind)}
    if set(values) != expected:
        raise ValueError(f"fields {sorted(set(values) ^ expected)} are unknown or missing")


def _plain_number(value: object) -> int | float:
    # 64 must come back as 64, not as 64.0: a message would show a difference where there is none.
    return value if type(value) is int else as_number(value)


def _read_stream(directory: Path) -> StreamParts:
    return read_json(directory / STREAM), _read_tensors(directory / STREAM_TENSORS)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with reading(path):
        tensors = load_file(path, device="cpu")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{path}: {short(name)} holds values that are not finite; the run had "
                    "diverged already: go back to an earlier checkpoint"
                )
        return tensors
