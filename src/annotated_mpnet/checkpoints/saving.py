"""Saving beside training: a copy is taken, and a thread writes it while the next updates are made.

What a checkpoint is, and in which order it comes to the disk, is `checkpoints/checkpoint.py`'s. It takes
seconds, and for as long as the loop waits for them nothing is trained. Of those seconds very few
need the weights to stand still:

    copy     network and AdamW's means into the CPU's memory        the loop waits
    write    files, hashes, fsync, rename, fsync, prune             a thread; the loop goes on

    loop      update 98   99  100 |copy| 101  102  103  104  ...  200 |copy| 201 ...
    thread                              write ........ on the disk          write ...

The copy has 12 bytes for each weight, of MPNet-base in GB

>>> round(109_518_527 * (4 + 2 * 4) / 1e9, 1)
1.3

and lives in memory that the next copy uses again: to ask the system for that much takes longer than
to fill it. On CUDA it is pinned, which the GPU writes to by itself.

**One at a time.** There is one copy, so that a save which finds the former one still being written
waits for it; intervals that short are for toys. An update that has found a new best loss where a
checkpoint is due has two names, and one copy serves both: they hold the same tensors.

**What is promised is promised of the disk.** The loop may be ahead of it, but what is said is not:
"saved after update 250" is said when `finish` has returned, and a run that ends, in whatever way,
waits for its last write. Killed before that, it goes on from the checkpoint before, as it would if
it had been killed while the loop waited. The order of checkpoints is that in which they were taken,
since there is one thread; and a later one is not begun when an earlier one has failed.

**A failed write** ends the run, as it did when the loop waited for it: not at once, but where the
loop looks next, which is before the next update. At the end, or before it stops for a signal, the
loop waits to see. Only that thread fails: it says nothing itself, neither errors nor warnings,
because a terminal that two threads write to shows neither.

**Why a thread and not a process.** A process would need the copy in memory of its own or shared
with it, could be killed by itself, and would have to be asked whether it was. What speaks against
threads in Python, that only one of them runs at a time, is no matter here: writing (safetensors),
hashing and fsync let go of the interpreter while they work. With 1 GB being written and hashed, the
longest that another thread waited was 13 ms, and mostly it did not (`docs/log.md`). What is left of
the cost is a core, for as long as a hash of 1.3 GB takes: nothing beside a GPU, and some of the
time on a machine with two cores that has to compute with both.

**Several processes.** Rank 0 copies and writes. The others hand over their shares, if there are any
(--fsdp), and go on: none waits for a disk but at the end. Should a write fail, rank 0 stops before
the next update, and the others learn of it as they do of each failure (`distributed.py`).

HF: the Trainer waits. PyTorch: `torch.distributed.checkpoint.async_save` copies and writes in the
same way, in a format of its own.

Next: `checkpoints/retention.py`; `mpnet/loop.py`, which says when.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from annotated_mpnet.checkpoints.checkpoint import (
    Checkpoint,
    StreamParts,
    TrainState,
    save_checkpoint,
)
from annotated_mpnet.checkpoints.retention import prune
from annotated_mpnet.checkpoints.run_directory import RunDirectory
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.optimizer import optimizer_tensors
from annotated_mpnet.streams.reservoir import StreamCounts, StreamState
from annotated_mpnet.training.distributed import World, full_tensor
from annotated_mpnet.training.trainer import Trainer

T = TypeVar("T")


class Saver:
    """Saves the checkpoints of a run beside it; a context manager, at whose end nothing is left to
    write.

    Its methods are called by all ranks, and the directory is there on rank 0 only.

    Attributes:
        stream_counts: what the run has read of a stream until the last copy.
    """

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory | None,
        save_tokenizer: Callable[[Path], None],
    ) -> None:
        """Begin with nothing to write.

        Args:
            trainer: whose network and optimizer are saved; warnings go to its tracker.
            directory: the run's; None on all ranks but the first.
            save_tokenizer: called, in the thread, with an empty directory to fill.
        """
        self.stream_counts = StreamCounts()
        self._trainer = trainer
        self._directory = directory
        self._save_tokenizer = save_tokenizer
        self._writer: Writer[list[str]] = Writer()
        self._network, self._means = Copy(), Copy()
        # The update that the copy is of, and the streams of all ranks behind it.
        self._copied: int | None = None
        self._streams: list[StreamState] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what is being written, also if the run has failed: it is a good checkpoint.

        Behind this the directory's lock is let go, and another process may write there.
        """
        try:
            self._say(self._writer.over(wait=True))
        except Exception as failed:
            if error is None:
                raise
            # The run ends with the error that came first, and does not keep quiet about the other.
            self._trainer.tracker.warn(f"and the last checkpoint was not saved: {failed}")
        finally:
            self._writer.close()

    def save(self, name: str, state: TrainState, stream: StreamState | None) -> None:
        """Copy what a checkpoint is made of, and have it written.

        All ranks come here, in the same update, because each has its share of a tensor.

        Args:
            name: `checkpoint2500`, or `best_checkpoint`.
            state: of the run.
            stream: of this rank.

        Raises:
            WriteError: a former checkpoint could not be written.
        """
        # Between two updates nothing moves: a second name for the same one needs no second copy.
        if self._copied != state.update:
            # The memory that is copied into is being written from. Only rank 0 waits here, and the
            # others for it where they meet next.
            self._say(self._writer.over(wait=True))
            self._copy(state.update, stream)
        if self._directory is None:
            return
        checkpoint = Checkpoint(
            run_id=self._directory.run_id,
            state=state,
            stream=stream_parts(self._streams),
            model_config=self._trainer.model.config,
            model_tensors=self._network.tensors,
            optimizer_tensors=(
                self._means.tensors if self._trainer.config.run.save_optimizer_state else None
            ),
        )
        self._writer.begin(partial(self._write, self._directory.path, name, checkpoint))

    def check(self) -> None:
        """Raise what a write has failed with, if one has. Does not wait.

        Raises:
            WriteError: the disk is full, or not writable. Former checkpoints are as they were.
        """
        self._say(self._writer.over(wait=False))

    def finish(self) -> None:
        """Return when all that was saved is on the disk, on all ranks.

        Raises:
            WriteError: as `check`.
        """
        self._trainer.world.on_rank_0(lambda: self._say(self._writer.over(wait=True)))

    def _copy(self, update: int, stream: StreamState | None) -> None:
        """Copy tensors and streams, put together from those of all ranks."""
        trainer, world = self._trainer, self._trainer.world
        self._copied = update
        if trainer.config.run.save_optimizer_state:
            self._means.take(optimizer_tensors(trainer.optimizer, trainer.model), world)
        streams = world.gather_objects(stream)
        self._network.take(trainer.model.state_dict(), world)
        self._streams = [each for each in streams if each is not None]
        if self._streams:
            # With each checkpoint, so that an interrupted run has said what it did not train on.
            self.stream_counts = sum((each.counts for each in self._streams), StreamCounts())
            trainer.tracker.say(f"read until update {self._copied}: {self.stream_counts}")

    def _write(self, directory: Path, name: str, checkpoint: Checkpoint) -> list[str]:
        """Write, then prune; return warnings. In the thread, on rank 0."""
        save_checkpoint(directory, name, checkpoint, self._save_tokenizer)
        # Behind the return of `save_checkpoint`, and not before: until then the oldest may be the
        # only one. What cannot be deleted is a warning, and no reason to end a run.
        keep = self._trainer.config.run.keep_checkpoints
        return prune(directory, keep, checkpoint.run_id, protected={name})

    def _say(self, results: list[list[str]]) -> None:
        for warnings in results:
            for warning in warnings:
                self._trainer.tracker.warn(warning)


class Writer(Generic[T]):
    """A thread that does one thing after the other; what it fails with, it keeps until it is asked.

    >>> def fail():
    ...     raise OSError("the disk is full")
    >>> writer = Writer()
    >>> writer.begin(lambda: "first")
    >>> writer.over(wait=True)
    ['first']
    >>> writer.begin(fail)
    >>> writer.begin(lambda: print("never done"))  # would stand on what has failed
    >>> try:
    ...     writer.over(wait=True)
    ... except OSError as error:
    ...     print(error)
    the disk is full

    It is said once:

    >>> writer.over(wait=True)
    []
    >>> writer.close()
    """

    def __init__(self) -> None:
        # The thread starts with the first thing to do. The interpreter waits for it at its end.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._begun: deque[Future[T]] = deque()

    def begin(self, job: Callable[[], T]) -> None:
        """Do something when all that was begun before is done; and only if none of it has failed.

        Args:
            job: called in the thread.
        """
        former = self._begun[-1] if self._begun else None

        def after() -> T:
            # It is done, since there is one thread; this raises what it has raised.
            if former is not None:
                former.result()
            return job()

        self._begun.append(self._thread.submit(after))

    def over(self, *, wait: bool) -> list[T]:
        """Return the results of what is done, in order, each once.

        Args:
            wait: until everything is.

        Raises:
            Exception: what a job has raised; none behind it was begun.
        """
        results = []
        try:
            while self._begun and (wait or self._begun[0].done()):
                results.append(self._begun[0].result())
                self._begun.popleft()
        except Exception:
            # Those behind it carry the same error.
            self._begun.clear()
            raise
        return results

    def close(self) -> None:
        """End the thread, when it has done all that was begun."""
        self._thread.shutdown()


class Copy:
    """Tensors in the CPU's memory, as they were at one moment; the next one takes the same memory.

    >>> weight = torch.ones(2)
    >>> copy = Copy()
    >>> copy.take({"weight": weight}, World())
    >>> _ = weight.zero_()
    >>> copy.tensors
    {'weight': tensor([1., 1.])}
    >>> memory = copy.tensors["weight"].data_ptr()
    >>> copy.take({"weight": weight}, World())
    >>> copy.tensors, copy.tensors["weight"].data_ptr() == memory
    ({'weight': tensor([0., 0.])}, True)

    Attributes:
        tensors: on rank 0, whole; none on the others.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor], world: World) -> None:
        """Copy tensors, put together from shares; all ranks must call it, with the same names.

        One tensor at a time is whole on a device, since a network that needs --fsdp would not fit
        onto one as a whole.

        Args:
            tensors: the same names, shapes and types each time; AdamW has none before its first
                step, and has them from then on.
            world: the ranks.
        """
        on_gpu = False
        for name, tensor in tensors.items():
            complete = full_tensor(tensor)
            if not world.is_first:
                continue
            on_gpu = complete.device.type == "cuda"
            if name not in self.tensors:
                # The layout is that of the values' order, which is what safetensors can write.
                shape, dtype = complete.shape, complete.dtype
                self.tensors[name] = torch.empty(shape, dtype=dtype, pin_memory=on_gpu)
            # Into pinned memory the GPU writes by itself, one tensor behind the other ...
            self.tensors[name].copy_(complete.detach(), non_blocking=on_gpu)
        # ... and before it is through, there is nothing to write to a disk.
        if on_gpu:
            torch.cuda.current_stream().synchronize()


def stream_parts(states: list[StreamState]) -> StreamParts | None:
    """Return what a checkpoint keeps of a stream: the ranks' states, side by side.

    Plain values go into `stream.json`, arrays into `stream.safetensors`, which has one flat table
    of names; so a rank's number stands in front of them.

    >>> plain, tensors = stream_parts([StreamState(rank=rank, world_size=2) for rank in range(2)])
    >>> [each["rank"] for each in plain["ranks"]]
    [0, 1]
    >>> sorted(tensors)[:2]
    ['0.pending_ids', '0.pending_lengths']
    >>> [state.rank for state in streams_from((plain, tensors))]
    [0, 1]

    Args:
        states: of all ranks, in their order; none for text on the disk.

    Returns:
        Values and tensors; None without a stream.
    """
    if not states:
        return None
    parts = [state.to_parts() for state in states]
    tensors = {
        f"{rank}.{name}": torch.from_numpy(array)
        for rank, (_, arrays) in enumerate(parts)
        for name, array in arrays.items()
    }
    return {"ranks": [plain for plain, _ in parts]}, tensors


def streams_from(parts: StreamParts) -> list[StreamState]:
    """Return the states that `stream_parts` put together.

    The file is whole, or it would not have come so far (`checkpoints/manifest.py`). But whole is not
    yet what one expects: another version may have written it.

    >>> try:
    ...     streams_from(({"ranks": 3}, {}))
    ... except CheckpointError as error:
    ...     print(str(error).partition(":")[0])
    the state of the stream has other parts than expected

    Raises:
        CheckpointError: these are not its parts.
    """
    plain, tensors = parts
    ranks = plain.get("ranks")
    if not isinstance(ranks, list) or not all(isinstance(each, dict) for each in ranks):
        raise CheckpointError(
            "the state of the stream has other parts than expected: it was written by another "
            "version, or is damaged; go on from another checkpoint with --resume-checkpoint"
        )
    return [
        StreamState.from_parts(
            each,
            {
                name.removeprefix(f"{rank}."): tensor.numpy()
                for name, tensor in tensors.items()
                if name.startswith(f"{rank}.")
            },
        )
        for rank, each in enumerate(ranks)
    ]
