"""A checkpoint: one directory from which a run can resume, or a model can be exported.

    checkpoint2500/
        model.safetensors      the model, under fairseq's names
        optimizer.safetensors  the optimizer's means and step counts (absent: export only)
        state.json             TrainState: how far the run is, and what must not change
        config.json            ModelConfig: the model's dimensions
        stream.json, .safetensors   the position in a streamed dataset (absent for local files)
        tokenizer/
        export/                what an export needs besides: facts for the model card, and the
                               modules of a sentence encoder (absent in older checkpoints)
        manifest.json          sizes and hashes of all files (`manifest.py`)

The state is small because nothing random depends on history (`mpnet/randomness.py`): the number of
the next update determines its batch, masks and dropout. Only a stream has a past: its position and
its shuffle buffer.

Saving may be interrupted after any step (`files/atomic.py`):

    killed while it                on disk                                the next start (`recover`)
    -----------------------------  -------------------------------------  --------------------------
    writes and syncs               .tmp-checkpoint2500                    deletes it
    is between the two renames     .tmp-, .old-checkpoint2500             renames the old one back
    deletes what was replaced      checkpoint2500, .old-checkpoint2500    deletes the old one

The two renames are needed only if the name is taken. A checkpoint is reported as saved, and older
ones are pruned, after the last sync.

A best checkpoint and a regular one of the same update hold the same tensors. They are stored once:
the second has hard links to the files of the first, where the file system can do that.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from annotated_mpnet.checkpoints.manifest import (
    FileRecord,
    read_files,
    read_manifest,
    verify_checkpoint,
    write_manifest,
)
from annotated_mpnet.errors import CheckpointError, WriteError, shown
from annotated_mpnet.files.atomic import replacing, write_files
from annotated_mpnet.files.output import errno_of
from annotated_mpnet.files.records import Count, decode_exactly, reading, to_json
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.streams.reservoir import StreamState

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
CONFIG = "config.json"
STREAM = "stream.json"
STREAM_TENSORS = "stream.safetensors"
TOKENIZER = "tokenizer"
EXPORT_FILES = "export"
BEST = "best_checkpoint"

NUMBERED = re.compile(r"checkpoint(0|[1-9][0-9]{0,17})")
"""One name per number: "checkpoint007" is not ours. 18 digits always fit 64 bits."""

IdentityValue = str | int | float


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a resume restores, except tensors."""

    update: Count
    """Updates done: the number, from 0, of the next one."""
    tokens_seen: Count
    """Without padding; like the next number, only for the report."""
    predicted_seen: Count
    best_valid_bits: float | None
    """Without it, the first evaluation after a resume would overwrite the best checkpoint."""
    identity: dict[str, IdentityValue]
    """What must be the same on resume (data, seed, batch, ...): see `compare_identity`."""
    evaluation_due: bool = False
    """Whether the evaluation after this update was abandoned; a resume begins with it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory."""

    run_id: str
    state: TrainState
    model_config: ModelConfig
    model_tensors: Mapping[str, Tensor]
    """By parameter name; a tied matrix once."""
    optimizer_tensors: Mapping[str, Tensor] | None
    """By what it is ("exp_avg." and so on) and the parameter's name. None: export only."""
    streams: Sequence[StreamState] = ()
    """Where each rank is in a streamed dataset; empty for text on the disk."""
    export_files: Mapping[str, bytes] = field(default_factory=dict)
    """Path in `export/` -> content."""


def checkpoint_name(update: int) -> str:
    """Return the name of the checkpoint after that many updates."""
    return f"checkpoint{update}"


def save_checkpoint(
    directory: Path,
    name: str,
    checkpoint: Checkpoint,
    save_tokenizer: Callable[[Path], None],
    twin: str | None = None,
) -> Path:
    """Save a checkpoint in a run's directory; it is on disk when this returns.

    Args:
        directory: the run's directory; it must exist.
        name: `checkpoint_name(update)` or `BEST`. A checkpoint of this run with that name is
            replaced; a damaged one is kept as `NAME.damaged`.
        checkpoint: what to save.
        save_tokenizer: called with an empty directory to fill.
        twin: the name of a checkpoint that was just saved with the same tensors.

    Raises:
        WriteError: full disk, lost permission; earlier checkpoints are unchanged.
        CheckpointError: the name is taken by another run.
    """
    target = directory / name
    other = owner(target)
    if other not in (None, checkpoint.run_id):
        raise CheckpointError(
            f"{target} belongs to another run ({shown(other)}, expected "
            f"{shown(checkpoint.run_id)}) and was left unchanged; move it away, or choose another "
            "--checkpoint-dir, and --resume"
        )
    try:
        # A run's directory that was deleted must not come back with this checkpoint alone in it.
        os.stat(directory)
        with replacing(target) as temporary:
            _write(temporary, checkpoint, save_tokenizer, directory / twin if twin else None)
            _keep_damaged(target)
    except Exception as error:
        number = errno_of(error)
        if number is None:
            raise
        raise WriteError(_explain(target, checkpoint, number)) from error
    return target


def load_checkpoint(directory: Path, *, to_resume: bool = True) -> Checkpoint:
    """Verify and read a checkpoint; its tensors are on the CPU. Raises `CheckpointError`.

    Without `to_resume`, optimizer and streams are not read. A resume never starts with empty means:
    AdamW's first step would move every weight by the whole learning rate, whatever its gradient.
    """
    # Now the files are as they were written. Are they all there, and was the directory renamed?
    manifest = verify_checkpoint(directory)
    for name in (MODEL, STATE, CONFIG):
        if name not in manifest.files:
            raise CheckpointError(f"{directory / name} is missing; the checkpoint is incomplete")
    state = read_state(directory / STATE)
    if NUMBERED.fullmatch(directory.name) and directory.name != checkpoint_name(state.update):
        raise CheckpointError(
            f"{directory / STATE} says update {state.update}, expected "
            f"{directory.name.removeprefix('checkpoint')} from the directory's name: it was "
            "renamed, or belongs to another checkpoint"
        )
    optimizer_tensors = None
    if to_resume:
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
        model_config=read_model_config(directory / CONFIG),
        model_tensors=_read_tensors(directory / MODEL),
        optimizer_tensors=optimizer_tensors,
        streams=_read_streams(directory) if to_resume and STREAM in manifest.files else (),
        export_files=read_files(directory, manifest, EXPORT_FILES),
    )


def read_state(path: Path) -> TrainState:
    """Read `state.json`; raises `CheckpointError`. Older ones have no `evaluation_due`."""
    return decode_exactly(path, TrainState, evaluation_due=False)


def read_model_config(path: Path) -> ModelConfig:
    """Read a `config.json`, not verified: a resume needs it before it hashes gigabytes."""
    return decode_exactly(path, ModelConfig)


def owner(path: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if its manifest does not say."""
    try:
        return read_manifest(path).run_id
    except CheckpointError:
        return None


@dataclass(frozen=True)
class _StreamRecord:
    ranks: list[dict[str, Any]]


def _write(
    directory: Path,
    checkpoint: Checkpoint,
    save_tokenizer: Callable[[Path], None],
    twin: Path | None,
) -> None:
    (directory / TOKENIZER).mkdir()
    save_tokenizer(directory / TOKENIZER)
    (directory / STATE).write_text(to_json(checkpoint.state))
    (directory / CONFIG).write_text(to_json(checkpoint.model_config))
    linked = _link_tensors(twin, directory) if twin else {}
    if not linked:
        _write_tensors(directory / MODEL, checkpoint.model_tensors)
        if checkpoint.optimizer_tensors is not None:
            _write_tensors(directory / OPTIMIZER, checkpoint.optimizer_tensors)
    if checkpoint.streams:
        _write_streams(directory, checkpoint.streams)
    write_files(directory / EXPORT_FILES, checkpoint.export_files)
    # safetensors gives its files mode 0600; other files follow the umask.
    for path in directory.glob("*.safetensors"):
        path.chmod((directory / STATE).stat().st_mode)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(directory, checkpoint.run_id, now, linked)


def _link_tensors(twin: Path, directory: Path) -> dict[str, FileRecord]:
    """Link the tensors of another checkpoint; return their records, or none if that is impossible.

    The records are those of the twin's manifest: hashed again, damage since would count as right.
    """
    try:
        files = read_manifest(twin).files
        tensors = {name: files[name] for name in (MODEL, OPTIMIZER) if name in files}
        for name in tensors:
            os.link(twin / name, directory / name)
    # A file system without hard links, or someone has deleted the twin.
    except (OSError, CheckpointError):
        for name in (MODEL, OPTIMIZER):
            (directory / name).unlink(missing_ok=True)
        return {}
    return tensors


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors sorts by dtype and name, so equal tensors give equal bytes. It refuses a tensor
    # whose memory is not in the order of its values, such as a transposed matrix.
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors; raises `CheckpointError` for NaN: an intact file may be of a diverged run."""
    with reading(path):
        tensors = load_file(path, device="cpu")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{path}: {shown(name)} holds NaN or infinite values: the run had already "
                    "diverged; go back to an earlier checkpoint"
                )
        return tensors


def _write_streams(directory: Path, states: Sequence[StreamState]) -> None:
    """Write the streams of all ranks; all arrays go into one file."""
    parts = [state.to_parts() for state in states]
    (directory / STREAM).write_text(to_json(_StreamRecord([values for values, _ in parts])))
    tensors = {
        f"{rank}.{name}": torch.from_numpy(array)
        for rank, (_, arrays) in enumerate(parts)
        for name, array in arrays.items()
    }
    _write_tensors(directory / STREAM_TENSORS, tensors)


def _read_streams(directory: Path) -> list[StreamState]:
    """Read what `_write_streams` wrote; raises `CheckpointError` for another version's."""
    ranks = decode_exactly(directory / STREAM, _StreamRecord).ranks
    arrays: list[dict[str, Any]] = [{} for _ in ranks]
    for name, tensor in _read_tensors(directory / STREAM_TENSORS).items():
        rank, _, array = name.partition(".")
        arrays[int(rank)][array] = tensor.numpy()
    return [StreamState.from_parts(*each) for each in zip(ranks, arrays, strict=True)]


def _keep_damaged(target: Path) -> None:
    """Give a damaged checkpoint of the target's name another one; its files may not be ours."""
    # `lexists`, because a dangling link takes the name too.
    if os.path.lexists(target) and owner(target) is None:
        names = (target.with_name(f"{target.name}.damaged{n if n > 1 else ''}") for n in count(1))
        os.rename(target, next(path for path in names if not os.path.lexists(path)))


def _explain(target: Path, checkpoint: Checkpoint, number: int) -> str:
    """Say what could not be written, why, and how much room it needs and there is."""
    tensors = [*checkpoint.model_tensors.values(), *(checkpoint.optimizer_tensors or {}).values()]
    needed = sum(tensor.nbytes for tensor in tensors) / 1e6 + 1  # tokenizer
    message = f"{target} could not be written: {os.strerror(number)}; needed {needed:.0f} MB"
    try:
        message += f", free {shutil.disk_usage(target.parent).free / 1e6:.0f} MB"
    except OSError:  # the disk itself is gone
        message += f"; the free space of {target.parent} is unknown"
    if not any(target.parent.glob(f"*/{STATE}")):
        return f"{message}; it is the first one: make room or fix that, and start with --overwrite"
    return (
        f"{message}; earlier checkpoints are intact: make room or fix that, and continue with "
        "--resume"
    )
