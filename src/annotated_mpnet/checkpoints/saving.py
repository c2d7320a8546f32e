"""Saving during training: the loop makes a copy, and a thread writes it during the next updates.

Saving takes seconds, but the weights must not change only while they are copied:

    copy     model and AdamW's means into CPU memory           the loop waits
    write    files, hashes, fsync, rename, fsync, prune        a thread; the loop continues

    loop      update 98   99  100 |copy| 101  102  103  104  ...  200 |copy| 201 ...
    thread                              write ........ on disk             write ...

There is one copy, of 12 bytes per weight (1.3 GB for MPNet-base), in memory that is reused. So a
save waits for the previous write; but a new best model and the checkpoint of the same update share
the copy, and the files.

Nothing is reported before it is on disk: `finish` waits, and so does a run that ends, however it
ends. A failed write ends the run before the next update, and no later checkpoint is written. The
thread prints nothing itself.

A thread is enough: writing, hashing and fsync release the interpreter's lock. While 1 GB was
written and hashed, no other thread waited longer than 13 ms (`docs/log.md`).
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from annotated_mpnet.checkpoints.checkpoint import Checkpoint, TrainState, save_checkpoint
from annotated_mpnet.checkpoints.optimizer_state import optimizer_tensors
from annotated_mpnet.checkpoints.retention import prune
from annotated_mpnet.checkpoints.run_directory import RunDirectory
from annotated_mpnet.settings.config import RunConfig
from annotated_mpnet.streams.reservoir import StreamCounts, StreamState
from annotated_mpnet.training.distributed import World, full_tensor
from annotated_mpnet.training.trainer import Trainer


class Saver:
    """Saves the checkpoints of a run; all ranks call its methods."""

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory | None,
        run: RunConfig,
        save_tokenizer: Callable[[Path], None],
    ) -> None:
        """Save the model and optimizer of a trainer; only rank 0 has a directory."""
        self.stream_counts = StreamCounts()
        """What the run had read of a stream at the last copy."""
        self._trainer = trainer
        self._directory = directory
        self._run = run
        self._save_tokenizer = save_tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writes: list[Future[list[str]]] = []
        # The copy: of which update, and what.
        self._copied: int | None = None
        self._twin: str | None = None
        self._model: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._streams: list[StreamState] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the last write, even if the run has failed: then the lock may be released."""
        try:
            self._collect(wait=True)
        except Exception as failed:
            if error is None:
                raise
            # The run ends with the error that came first.
            self._trainer.tracker.warn(f"the last checkpoint was not saved either: {failed}")
        finally:
            self._thread.shutdown()

    def save(
        self,
        name: str,
        state: TrainState,
        stream: StreamState | None,
        export_files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Copy the state of a run and start to write it, on all ranks in the same update.

        Raises:
            WriteError: an earlier checkpoint could not be written.
        """
        if self._copied != state.update:
            # The thread still reads the memory that is about to be overwritten.
            self._collect(wait=True)
            self._copy(state.update, stream)
        if self._directory is None:
            return
        path, run = self._directory.path, self._run
        checkpoint = Checkpoint(
            run_id=self._directory.run_id,
            state=state,
            streams=self._streams,
            model_config=self._trainer.model.config,
            model_tensors=self._model,
            optimizer_tensors=self._means if run.save_optimizer_state else None,
            export_files=export_files,
        )
        earlier = list(self._writes)
        twin, self._twin = self._twin, name

        def write() -> list[str]:
            for each in earlier:
                each.result()  # has ended, since there is one thread; raises if it failed
            save_checkpoint(path, name, checkpoint, self._save_tokenizer, twin)
            return prune(path, run.keep_checkpoints, checkpoint.run_id, protected={name})

        self._writes.append(self._thread.submit(write))

    def check(self) -> None:
        """Raise the `WriteError` of a write that has failed; does not wait."""
        self._collect(wait=False)

    def finish(self) -> None:
        """Wait, on all ranks, until everything is on disk; raises `WriteError` if it cannot be."""
        self._trainer.world.on_rank_0(lambda: self._collect(wait=True))

    def _copy(self, update: int, stream: StreamState | None) -> None:
        trainer, world = self._trainer, self._trainer.world
        self._copied, self._twin = update, None
        if self._run.save_optimizer_state:
            copy_into(self._means, optimizer_tensors(trainer.optimizer, trainer.model), world)
        streams = world.gather_objects(stream)
        copy_into(self._model, trainer.model.state_dict(), world)
        self._streams = [each for each in streams if each is not None]
        if self._streams:
            # With each checkpoint, so an interrupted run has said what it did not train on.
            self.stream_counts = sum((each.counts for each in self._streams), StreamCounts())
            trainer.tracker.say(f"read until update {self._copied}: {self.stream_counts}")

    def _collect(self, *, wait: bool) -> None:
        """Report the warnings of writes that have ended; raise the error of the first to fail."""
        try:
            while self._writes and (wait or self._writes[0].done()):
                for warning in self._writes[0].result():
                    self._trainer.tracker.warn(warning)
                del self._writes[0]
        except Exception:
            self._writes.clear()  # the later ones have the same error
            raise


def copy_into(copy: dict[str, Tensor], tensors: Mapping[str, Tensor], world: World) -> None:
    """Copy tensors of all ranks into the CPU memory of rank 0, which the next call reuses.

    Only one tensor at a time is whole on a device: a model that needs --fsdp would not fit on one.
    """
    on_gpu = False
    for name, tensor in tensors.items():
        complete = full_tensor(tensor).detach()
        if not world.is_first:
            continue
        on_gpu = complete.device.type == "cuda"
        if name not in copy:
            # Contiguous, as safetensors needs it, and pinned, so the GPU can write to it itself.
            copy[name] = torch.empty(complete.shape, dtype=complete.dtype, pin_memory=on_gpu)
        copy[name].copy_(complete, non_blocking=on_gpu)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
