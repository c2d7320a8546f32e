"""Checkpoints: how a run survives its own death.

A checkpoint is a directory, and everything in it is plain tensors, JSON and text:

    checkpoint2500/
        model.safetensors      the network, under fairseq's names
        optimizer.safetensors  AdamW's two means and step counts (absent: export only)
        state.json             TrainState: where the run stands, and what it must not change
        config.json            ModelConfig: the network in plain numbers
        stream.json, .safetensors   where a streamed dataset stands (absent for local files)
        tokenizer/             so that the directory is enough to go on, or to export
        manifest.json          sizes and hashes of all of it, written last (`checkpoints/manifest.py`)

State is so small because nothing random has a history (`mpnet/randomness.py`): the number of the next
update says which batch, masks and dropout come next. No generator is saved. Only a stream has a
past, since nobody can jump to its millionth row: its position, and the rows that wait in its
shuffle buffer, are saved as they are (`streams/streams.py`).

Saving is a protocol of which every step may be the last one that happens:

    write    .tmp-checkpoint2500/, every file fsynced       a stale .tmp- is deleted at the start
    seal     its manifest.json, fsynced                     still a .tmp-
    publish  rename .tmp-checkpoint2500 -> checkpoint2500   whole: a rename happens or does not
    sync     the parent directory                           from here on a power cut cannot undo it
    (only now does the caller hear of it, and prunes)

A name that is taken, because best_checkpoint gets better or because a run that fell back to an
older checkpoint passes here again, first steps aside to `.old-checkpoint2500`. Killed between the
two renames, the directory has the old one under that name, and `recover` renames it back.

Killed after each of these in turn, the next start finds:

    killed after   on the disk                                     the next start
    write          .tmp-checkpoint2500, no manifest                deletes it
    seal           .tmp-checkpoint2500, whole                      deletes it: nobody heard of it
    step aside     the same and .old-checkpoint2500                renames the old one back
    publish        checkpoint2500 and .old-checkpoint2500          deletes the old one

In none of the rows is there a moment without a whole checkpoint under its name, or on its way back
to it. That is why `.tmp-` lies beside its target, and not where temporary files usually do: a
rename happens as a whole only within a file system. And that is why every file is synced before the
rename: a file system may write the new name to the disk before the bytes that it names, and after a
power cut there would be a whole name of empty files.

Loading reads nothing that `verify_checkpoint` has not vouched for, and refuses weights that are
not numbers.

**What it costs.** MPNet-base with AdamW's two means is 1.3 GB: 6 s to save, 2.5 s to load, of
which 0.8 go into hashes (`docs/log.md`). The loop does not wait for it: it leaves a copy to a
thread and goes on (`checkpoints/saving.py`).

fairseq: `torch.save`, so a pickle that runs code when it is loaded.

Next: `checkpoints/saving.py`, which does this beside the loop; `checkpoints/retention.py`, the checkpoints of one
directory; `checkpoints/run_directory.py`; `checkpoints/resume.py`.
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

from annotated_mpnet.checkpoints.manifest import (
    read_manifest,
    sync,
    verify_checkpoint,
    write_manifest,
)
from annotated_mpnet.checkpoints.strict_json import (
    as_count,
    as_number,
    read_json,
    reading,
    short,
    to_json,
)
from annotated_mpnet.errors import CheckpointError, WriteError
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
"""One name for one number: "checkpoint007" is none of ours. At most 18 digits, because that is what
always fits 64 bits; Python itself refuses to read a number of 5000, with an error of its own."""
TEMPORARY = ".tmp-"
REPLACED = ".old-"

IdentityValue = str | int | float
StreamParts = tuple[Mapping[str, object], Mapping[str, Tensor]]
"""A stream's state as what JSON can hold, and tensors. What they mean is `streams/reservoir.py`'s business:
here they are parts like others, to be written, hashed and given back."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that resumes, but for the tensors.

    So little that it can be shown. This is a whole `state.json`, after 2500 updates:

    >>> state = TrainState(
    ...     update=2500, tokens_seen=163_840_000, predicted_seen=24_576_000, best_valid_bits=5.25,
    ...     identity={"data": "4be1 and so on", "seed": 12345, "batch": 128, "length": 512})
    >>> print(to_json(dataclasses.asdict(state)), end="")
    {
      "best_valid_bits": 5.25,
      "identity": {
        "batch": 128,
        "data": "4be1 and so on",
        "length": 512,
        "seed": 12345
      },
      "predicted_seen": 24576000,
      "tokens_seen": 163840000,
      "update": 2500
    }

    The learning rate is not in it: it is a function of the update (`mpnet/optimizer.py`). Nor is the
    epoch: it is one of the update, the batch and the number of rows (`training/loader.py`). What
    follows from something else would be a second place for it, and could contradict it.

    Frozen, so that a state that was handed to a checkpoint stays what it was: the loop replaces it.
    """

    update: int
    """Updates done: the number, counted from 0, of the update that comes next."""
    tokens_seen: int
    """Tokens trained on so far, padding not counted. Like the next one, for the report only: it
    decides nothing."""
    predicted_seen: int
    """Predicted tokens so far."""
    best_valid_bits: float | None
    """Lowest validation loss so far, bits per predicted token; None before the first one. Were it
    forgotten, the first evaluation behind a resume would count as the best, and overwrite it."""
    identity: dict[str, IdentityValue]
    """What must be the same on resume (data, seed, batch, ...): see `compare_identity`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory. Only references: to make one copies no tensor."""

    run_id: str
    """Whose it is. Only its own run may replace or delete it."""
    state: TrainState
    model_config: ModelConfig
    """All that is needed to build the network which the tensors fit."""
    model_tensors: Mapping[str, Tensor]
    """By the parameters' names; a tied matrix once."""
    optimizer_tensors: Mapping[str, Tensor] | None
    """By "exp_avg.", "exp_avg_sq." or "step.", and the parameter's name. None: saved
    without, for export only; or not asked for."""
    stream: StreamParts | None = None
    """Where the stream of training text stands; None for text that has no past."""


def checkpoint_name(update: int) -> str:
    """Return the name of the checkpoint after so many updates.

    The name repeats what `state.json` says, so that the newest is found by a look at the names, and
    a directory that was renamed by hand is noticed.

    >>> checkpoint_name(2500)
    'checkpoint2500'
    >>> int(NUMBERED.fullmatch(checkpoint_name(2500))[1]), NUMBERED.fullmatch("checkpoint007")
    (2500, None)
    """
    return f"checkpoint{update}"


def save_checkpoint(
    directory: Path, name: str, checkpoint: Checkpoint, save_tokenizer: Callable[[Path], None]
) -> Path:
    """Save a checkpoint under a run's directory; when this returns, it is on the disk.

    Here is one of four weights, saved and loaded:

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
    # Before a byte is written: it can happen only where somebody has moved directories about, and
    # then nothing shall be changed at all.
    _refuse_to_replace_foreign(target, checkpoint.run_id)
    try:
        # Left by a save that failed in this very process; a killed one's is gone since `recover`.
        if temporary.exists():
            shutil.rmtree(temporary)
        _write(temporary, checkpoint, save_tokenizer)
        _publish(temporary, target)
    # Half a checkpoint on a full disk would take the room that the next attempt needs. What is not
    # the system's refusal is a bug and keeps its traceback.
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
            or without the optimizer's state.

    That is never replaced by an empty one. AdamW divides the mean of a weight's gradients by their
    root mean square. Where gradients mostly cancel out, as they do after thousands of updates, the
    mean is small beside the other, and so are the steps (here in learning rates):

    >>> mean = square = 0.0
    >>> for gradient in 500 * [5.0, -4.8]:
    ...     mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient**2
    >>> round(mean / square**0.5, 2)
    -0.03

    But of a single gradient the two are the same. A cold start would move every weight by the whole
    learning rate, the one with a hardly measurable gradient as far as any other:

    >>> for gradient in (0.001, 5.0):
    ...     mean, square = 0.1 * gradient, 0.02 * gradient**2
    ...     print(round((mean / 0.1) / (square / 0.02) ** 0.5, 2))  # corrected for the start
    1.0
    1.0
    """
    # Every file that the manifest names is as it was written. What follows asks whether it is what
    # a resume needs: a manifest that names too little, or a directory that was renamed, is whole.
    manifest = verify_checkpoint(directory)
    for name in (MODEL, STATE, CONFIG):
        if name not in manifest.files:
            raise CheckpointError(f"{directory / name} is missing; the checkpoint is incomplete")
    # `best_checkpoint` has no number in its name, nor has one that was moved elsewhere to be kept.
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
        # AdamW has nothing to remember before its first step, and only then.
        if state.update > 0 and not optimizer_tensors:
            raise CheckpointError(f"{directory / OPTIMIZER} is empty after update {state.update}")
    return Checkpoint(
        run_id=manifest.run_id,
        state=state,
        model_config=read_model_config(directory / CONFIG),
        model_tensors=_read_tensors(directory / MODEL),
        optimizer_tensors=optimizer_tensors,
        stream=_read_stream(directory) if STREAM in manifest.files else None,
    )


def _write(directory: Path, checkpoint: Checkpoint, save_tokenizer: Callable[[Path], None]) -> None:
    """Write all files under the temporary name, and the manifest behind them."""
    # mkdir and open follow the umask, unlike tempfile, which makes everything private.
    directory.mkdir()
    (directory / TOKENIZER).mkdir()
    save_tokenizer(directory / TOKENIZER)
    # None of these is synced here. `write_manifest` does it for every file that it finds, so that
    # none can be forgotten, and also for those of the tokenizer, which other people's code writes.
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
    # Time and run stand in the manifest and nowhere else: all the rest is a function of the state,
    # so that two runs can be compared by the hashes of their files.
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(directory, checkpoint.run_id, now)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, in one order, whatever the order that they come in.

    safetensors orders by dtype and name, and without metadata its header has no other freedom:
    equal tensors give equal bytes.

    >>> from tempfile import TemporaryDirectory
    >>> square = torch.arange(4.0).reshape(2, 2)
    >>> with TemporaryDirectory() as folder:
    ...     one, other = Path(folder, "one"), Path(folder, "other")
    ...     _write_tensors(one, {"a": square, "b": square.T})
    ...     _write_tensors(other, {"b": square.T, "a": square})
    ...     one.read_bytes() == other.read_bytes()
    True
    """
    # `contiguous`, because it refuses a tensor whose memory is not in the order of its values, such
    # as a matrix that was transposed.
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _publish(temporary: Path, target: Path) -> None:
    """Give a whole checkpoint its name: the two renames of the table above."""
    # `lexists`, because a link that leads nowhere takes the name all the same.
    former = None
    if os.path.lexists(target):
        former = _place_aside(target)
        os.rename(target, former)
    try:
        os.rename(temporary, target)
    # Only a refusal of the system comes here. Killed at this point, there is nobody left to rename
    # anything, and `recover` does the same at the next start.
    except OSError:
        if former is not None:
            os.rename(former, target)
        raise
    # Names are contents of their directory. Only when these are on the disk is the old one deleted,
    # or a power cut could bring back the list of names in which nothing else is there.
    sync(target.parent)
    if former is not None and former.name.startswith(REPLACED):
        shutil.rmtree(former, ignore_errors=True)


def _place_aside(target: Path) -> Path:
    """Return where a taken name steps aside: to be deleted if it is ours, else to be kept.

    A checkpoint of ours is replaced by one of the same update, or by a better one. Of a damaged one
    nobody knows what is in it; that is for its owner to look at, and two of them are both kept:

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     target = Path(folder, "checkpoint5")
    ...     for _ in range(3):
    ...         target.mkdir()
    ...         print(target.rename(_place_aside(target)).name)
    checkpoint5.damaged
    checkpoint5.damaged2
    checkpoint5.damaged3
    """
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
    """Return the id of the run that wrote a checkpoint; None if its manifest does not say.

    By the manifest alone, which has a checksum of its own: to verify the gigabytes that it vouches
    for would take seconds for each checkpoint that is looked at.
    """
    try:
        return read_manifest(path).run_id
    except CheckpointError:
        return None


def _refuse_to_replace_foreign(target: Path, run_id: str) -> None:
    """Raise a `CheckpointError` if another run's checkpoint has the name.

    Somebody has copied it there, perhaps as the only copy. A free name, and what does not say whose
    it is, pass here: the second steps aside.
    """
    other = owner(target)
    if other is not None and other != run_id:
        raise CheckpointError(
            f"{target} belongs to another run ({short(other)}, expected {short(run_id)}) and was "
            "left as it is; move it away, or choose another --checkpoint-dir, and --resume"
        )


def _system_error(error: Exception) -> int | None:
    """Return the errno of a failed write; None if the error is no failed write, but a bug.

    safetensors and tokenizers write in Rust and tell only in their text, each with its own class.

    >>> full = Exception("Error while serializing: I/O error: No space left (os error 28)")
    >>> _system_error(OSError(28, "No space left")), _system_error(full), _system_error(KeyError())
    (28, 28, None)
    """
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os error (\d+)", str(error))
    return None if number is None else int(number[1])


def _explain(target: Path, checkpoint: Checkpoint, number: int) -> str:
    """Say what could not be written, why, how much room it takes and how much there is.

    Both numbers, because "no space left" alone leaves its reader to guess whether it is a matter of
    a few files or of another disk. Asked after the temporary directory is gone: what is free now is
    what the next attempt has.
    """
    tensors = [*checkpoint.model_tensors.values(), *(checkpoint.optimizer_tensors or {}).values()]
    # The rest, tokenizer and JSON, is about a megabyte.
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6 + 1
    message = f"{target} could not be written: {os.strerror(number)}; needed {needed:.0f} MB"
    # The disk may be the very thing that is gone: a share of a network, a stick that was pulled.
    try:
        message += f", free {shutil.disk_usage(target.parent).free / 1e6:.0f} MB"
    except OSError:
        message += f", and {target.parent} cannot be asked what is free"
    remedy = "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return f"{message}; earlier checkpoints are intact: {remedy} and go on with --resume"


def read_state(path: Path) -> TrainState:
    """Read a state, unverified; raises `CheckpointError` for what cannot be one.

    Unverified, because `retention.newest_first` asks this of every `best_checkpoint` to sort it in.
    So each value is looked at as if it came from a stranger (`checkpoints/strict_json.py`): a damaged number
    that is still a number changes what is tried first, and is found when it is.
    """
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


def read_model_config(path: Path) -> ModelConfig:
    """Read a network's numbers, unverified; raises `CheckpointError` for what cannot be one.

    Before a resumed run builds its network it must know how wide that is, and to hash gigabytes for
    it would be too early: they are hashed when they are loaded.
    """
    values = read_json(path)
    with reading(path):
        _expect_fields(values, ModelConfig)
        for field in dataclasses.fields(ModelConfig):
            # The default of a field says its type. A whole number will do for a fraction (a dropout
            # of 0), but True will not for a whole number, although Python counts it as 1.
            value, expected = values[field.name], type(field.default)
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise TypeError(f"{field.name} is {value!r}, expected {expected.__name__}")
        # The types are right; whether the numbers fit together, heads and width, is its own affair.
        return ModelConfig(**values)  # type: ignore[arg-type]


def _expect_fields(values: Mapping[str, object], kind: type[TrainState | ModelConfig]) -> None:
    """Raise a `ValueError` unless all fields are there, and no others.

    A field that is missing must not become its default. Weights fit a network of either setting of
    `normalize_before`: the wrong one would load without a complaint, and predict nonsense.

    >>> _expect_fields({"update": 5, "epoch": 1}, TrainState)
    Traceback (most recent call last):
        ...
    ValueError: fields ['best_valid_bits', 'epoch', 'identity', ...] are unknown or missing
    """
    expected = {field.name for field in dataclasses.fields(kind)}
    if set(values) != expected:
        raise ValueError(f"fields {sorted(set(values) ^ expected)} are unknown or missing")


def _plain_number(value: object) -> int | float:
    # 64 must come back as 64, not as 64.0: a message would show a difference where there is none.
    return value if type(value) is int else as_number(value)


def _read_stream(directory: Path) -> StreamParts:
    return read_json(directory / STREAM), _read_tensors(directory / STREAM_TENSORS)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors onto the CPU; raises `CheckpointError`, naming the first that is not finite.

    Hashes prove that these are the bytes which were written, not that they were worth it: a network
    that had diverged when it was saved is intact, and every update from here on would be NaN.
    """
    # On the CPU, because a GPU may already hold a network, and because nothing says that the device
    # they were saved from is there.
    with reading(path):
        tensors = load_file(path, device="cpu")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{path}: {short(name)} holds values that are not finite; the run had "
                    "diverged already: go back to an earlier checkpoint"
                )
        return tensors
