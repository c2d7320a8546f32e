"""A checkpoint: one directory from which a run can resume, or a model can be exported.

    checkpoint2500/
        model.safetensors      the model, under fairseq's names
        optimizer.safetensors  AdamW's two means and step counts (absent: export only)
        state.json             TrainState: how far the run is, and what must not change
        config.json            ModelConfig: the model's dimensions
        stream.json, .safetensors   the position in a streamed dataset (absent for local files)
        tokenizer/
        manifest.json          sizes and hashes of all files, written last (`manifest.py`)

The state is small because nothing random depends on history (`mpnet/randomness.py`): the number of
the next update determines its batch, masks and dropout. Only a stream has a past: its position and
its shuffle buffer are saved as they are (`streams/streams.py`).

Saving is a protocol that may be interrupted after any step:

    write    .tmp-checkpoint2500/, every file fsynced
    seal     its manifest.json, fsynced
    publish  rename .tmp-checkpoint2500 to checkpoint2500
    sync     the parent directory: now a power cut cannot undo the rename
    (only now is the checkpoint reported as saved, and older ones are pruned)

If the name is taken, because there is a new best model or because a run that fell back to an older
checkpoint gets here again, the old directory is first renamed to `.old-checkpoint2500`.
`retention.recover` cleans up at the next start:

    killed after   on disk                                         the next start
    write          .tmp-checkpoint2500, no manifest                deletes it
    seal           .tmp-checkpoint2500, whole                      deletes it: it was not reported
    rename to .old the same and .old-checkpoint2500                renames the old one back
    publish        checkpoint2500 and .old-checkpoint2500          deletes the old one

So at every moment there is a whole checkpoint under its name, or one that gets it back. The
temporary directory is a sibling of its target because a rename is atomic only within a file system.
Files are synced before the rename because a file system may write the new name to disk before the
bytes: after a power cut there would be a complete name of empty files.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from annotated_mpnet.checkpoints.manifest import read_manifest, verify_checkpoint, write_manifest
from annotated_mpnet.checkpoints.records import Count, decode_exactly, reading, short, to_json
from annotated_mpnet.errors import CheckpointError, WriteError
from annotated_mpnet.files.atomic import sync
from annotated_mpnet.mpnet.config import ModelConfig

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
CONFIG = "config.json"
STREAM = "stream.json"
STREAM_TENSORS = "stream.safetensors"
TOKENIZER = "tokenizer"
BEST = "best_checkpoint"

NUMBERED = re.compile(r"checkpoint(0|[1-9][0-9]{0,17})")
"""One name per number: "checkpoint007" is not ours. 18 digits always fit 64 bits."""
TEMPORARY = ".tmp-"
REPLACED = ".old-"

IdentityValue = str | int | float
StreamParts = tuple[list[dict[str, Any]], Mapping[str, Tensor]]
"""The states of all ranks in a stream, as JSON values, and their arrays (`streams/reservoir.py`)."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a resume restores, except tensors: the content of `state.json`.

    What follows from these numbers is not saved (learning rate, epoch): it could contradict them.
    """

    update: Count
    """Updates done, which is the number, counted from 0, of the next one."""
    tokens_seen: Count
    """Tokens trained on so far, without padding; like the next number, only for the report."""
    predicted_seen: Count
    best_valid_bits: float | None
    """Lowest validation loss so far, in bits per predicted token; None before the first. Without
    it, the first evaluation after a resume would overwrite the best checkpoint."""
    identity: dict[str, IdentityValue]
    """What must be the same on resume (data, seed, batch, ...): see `compare_identity`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. It refers to tensors and copies none."""

    run_id: str
    state: TrainState
    model_config: ModelConfig
    model_tensors: Mapping[str, Tensor]
    """By parameter name; a tied matrix once."""
    optimizer_tensors: Mapping[str, Tensor] | None
    """By "exp_avg.", "exp_avg_sq." or "step." and the parameter's name. None: saved without, for
    export only, or not loaded."""
    stream: StreamParts | None = None
    """None for local files."""


def checkpoint_name(update: int) -> str:
    """Return the name of the checkpoint after that many updates.

    >>> checkpoint_name(2500)
    'checkpoint2500'
    """
    return f"checkpoint{update}"


def save_checkpoint(
    directory: Path, name: str, checkpoint: Checkpoint, save_tokenizer: Callable[[Path], None]
) -> Path:
    """Save a checkpoint in a run's directory; it is on disk when this returns.

    >>> from tempfile import TemporaryDirectory
    >>> state = TrainState(
    ...     update=5, tokens_seen=0, predicted_seen=0, best_valid_bits=None, identity={})
    >>> saved = Checkpoint(
    ...     run_id="0123abcd", state=state, model_config=ModelConfig(),
    ...     model_tensors={"lm_head.bias": torch.arange(4.0)}, optimizer_tensors=None)
    >>> with TemporaryDirectory() as folder:
    ...     path = save_checkpoint(Path(folder), "checkpoint5", saved, lambda directory: None)
    ...     print(path.name, sorted(each.name for each in path.iterdir()))
    ...     print(load_checkpoint(path, with_optimizer=False).model_tensors)
    checkpoint5 ['config.json', 'manifest.json', 'model.safetensors', 'state.json', 'tokenizer']
    {'lm_head.bias': tensor([0., 1., 2., 3.])}

    Args:
        directory: the run's directory; it must exist.
        name: `checkpoint_name(update)` or `BEST`. A checkpoint of this run with that name is
            replaced; a damaged one is kept as `NAME.damaged`.
        checkpoint: what to save. The same tensors give the same bytes, in any run.
        save_tokenizer: called with an existing, empty directory to fill.

    Raises:
        WriteError: full disk, lost permission. The temporary directory is removed and earlier
            checkpoints are unchanged.
        CheckpointError: the name is taken by another run.
    """
    target = directory / name
    temporary = directory / f"{TEMPORARY}{name}"
    other = owner(target)
    if other not in (None, checkpoint.run_id):
        raise CheckpointError(
            f"{target} belongs to another run ({short(other)}, expected "
            f"{short(checkpoint.run_id)}) and was left unchanged; move it away, or choose another "
            "--checkpoint-dir, and --resume"
        )
    try:
        # Left by an earlier save of this process that failed.
        if temporary.exists():
            shutil.rmtree(temporary)
        _write(temporary, checkpoint, save_tokenizer)
        _publish(temporary, target)
    # Half a checkpoint on a full disk would take the room that the next attempt needs.
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
        with_optimizer: False for export. A resume never starts with empty means: AdamW's first
            step moves every weight by the whole learning rate, whatever its gradient.

    Raises:
        CheckpointError: damaged, incomplete, of a newer format, with NaN or infinite weights, or
            without the optimizer's state.
    """
    # All files in the manifest are now as they were written, so what is left to check is whether
    # it lists all that is needed, and whether the directory was renamed.
    manifest = verify_checkpoint(directory)
    for name in (MODEL, STATE, CONFIG):
        if name not in manifest.files:
            raise CheckpointError(f"{directory / name} is missing; the checkpoint is incomplete")
    state = decode_exactly(directory / STATE, TrainState)
    if NUMBERED.fullmatch(directory.name) and directory.name != checkpoint_name(state.update):
        raise CheckpointError(
            f"{directory / STATE} says update {state.update}, expected "
            f"{directory.name.removeprefix('checkpoint')} from the directory's name: it was "
            "renamed, or belongs to another checkpoint"
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
    stream = None
    if STREAM in manifest.files:
        ranks = decode_exactly(directory / STREAM, _StreamRecord).ranks
        stream = ranks, _read_tensors(directory / STREAM_TENSORS)
    return Checkpoint(
        run_id=manifest.run_id,
        state=state,
        model_config=read_model_config(directory / CONFIG),
        model_tensors=_read_tensors(directory / MODEL),
        optimizer_tensors=optimizer_tensors,
        stream=stream,
    )


def read_model_config(path: Path) -> ModelConfig:
    """Read a `config.json`, not verified; raises `CheckpointError`.

    A resumed run needs the model's dimensions before it hashes gigabytes.
    """
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


def _write(directory: Path, checkpoint: Checkpoint, save_tokenizer: Callable[[Path], None]) -> None:
    """Write all files; `write_manifest` syncs them, those of the tokenizer too."""
    directory.mkdir()
    (directory / TOKENIZER).mkdir()
    save_tokenizer(directory / TOKENIZER)
    state = directory / STATE
    state.write_text(to_json(checkpoint.state), encoding="utf-8")
    (directory / CONFIG).write_text(to_json(checkpoint.model_config), encoding="utf-8")
    _write_tensors(directory / MODEL, checkpoint.model_tensors)
    if checkpoint.optimizer_tensors is not None:
        _write_tensors(directory / OPTIMIZER, checkpoint.optimizer_tensors)
    if checkpoint.stream is not None:
        ranks, tensors = checkpoint.stream
        (directory / STREAM).write_text(to_json(_StreamRecord(ranks)), encoding="utf-8")
        _write_tensors(directory / STREAM_TENSORS, tensors)
    # safetensors gives its files mode 0600; other files follow the umask.
    for path in directory.glob("*.safetensors"):
        path.chmod(state.stat().st_mode)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(directory, checkpoint.run_id, now)


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
                    f"{path}: {short(name)} holds NaN or infinite values: the run had already "
                    "diverged; go back to an earlier checkpoint"
                )
        return tensors


def _publish(temporary: Path, target: Path) -> None:
    """Give a whole checkpoint its name: the renames of the table above."""
    previous = None
    # `lexists`, because a dangling link takes the name too.
    if os.path.lexists(target):
        previous = _name_aside(target)
        os.rename(target, previous)
    try:
        os.rename(temporary, target)
    except OSError:
        if previous is not None:
            os.rename(previous, target)
        raise
    # Before the old one is deleted: a power cut could bring back the names from before the rename.
    sync(target.parent)
    if previous is not None and previous.name.startswith(REPLACED):
        shutil.rmtree(previous, ignore_errors=True)


def _name_aside(target: Path) -> Path:
    """Return a new name for what has the target's: ours is deleted later, a damaged one is kept.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     target = Path(folder, "checkpoint5")
    ...     for _ in range(3):
    ...         target.mkdir()
    ...         print(target.rename(_name_aside(target)).name)
    checkpoint5.damaged
    checkpoint5.damaged2
    checkpoint5.damaged3
    """
    if owner(target) is not None:
        previous = target.with_name(f"{REPLACED}{target.name}")
        if previous.exists():
            shutil.rmtree(previous)
        return previous
    previous, number = target.with_name(f"{target.name}.damaged"), 1
    while os.path.lexists(previous):
        number += 1
        previous = target.with_name(f"{target.name}.damaged{number}")
    return previous


def _system_error(error: Exception) -> int | None:
    """Return the errno of a failed write; None if the error is a bug.

    safetensors and tokenizers are written in Rust and say it only in their text.

    >>> full = Exception("Error while serializing: I/O error: No space left (os error 28)")
    >>> _system_error(OSError(28, "No space left")), _system_error(full), _system_error(KeyError())
    (28, 28, None)
    """
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os error (\d+)", str(error))
    return None if number is None else int(number[1])


def _explain(target: Path, checkpoint: Checkpoint, number: int) -> str:
    """Say what could not be written, why, and how much room it needs and there is."""
    tensors = [*checkpoint.model_tensors.values(), *(checkpoint.optimizer_tensors or {}).values()]
    # Tokenizer and JSON are about a megabyte.
    needed = sum(tensor.nbytes for tensor in tensors) / 1e6 + 1
    message = f"{target} could not be written: {os.strerror(number)}; needed {needed:.0f} MB"
    # The disk itself may be gone.
    try:
        message += f", free {shutil.disk_usage(target.parent).free / 1e6:.0f} MB"
    except OSError:
        message += f"; the free space of {target.parent} is unknown"
    remedy = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "fix that"
    return f"{message}; earlier checkpoints are intact: {remedy} and continue with --resume"
