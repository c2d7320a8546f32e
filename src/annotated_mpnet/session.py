"""A run in its directory: where it begins, what it saves, what it leaves behind.

The loop (`training/trainer.py`) knows numbers; a directory knows names. A `Session` stands between
the two, and is the same on all ranks: each of its methods is called by all of them, and does the
part that needs a disk on rank 0 only. So the order of what happens can be read here as if there
were one process:

    beginning    the checkpoint to go on from: find it, compare it, load it       or update 0
    train        the loop, which calls back to save
    test         the best model, on text that nothing was chosen by
    text_read    what became of the text, and how much of it was left out
    export       the best model, as Hugging Face's

**What travels between ranks.** A checkpoint is read once, by rank 0, and its tensors are sent to
the others, so that a machine without a view of the disk can take part. On the way back whole
tensors are put together one by one; each rank's place in a stream is collected, a few megabytes
each.

Next: `training/checkpoint.py` for what is written; `run.py`, which builds all this.
"""

import dataclasses
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from annotated_mpnet import conversion
from annotated_mpnet.batch import Batch
from annotated_mpnet.config import PretrainingConfig
from annotated_mpnet.config_file import to_toml
from annotated_mpnet.data import (
    BatchLoader,
    DataCollatorForMaskedPermutedLanguageModeling,
    PackedRows,
    evaluation_batches,
)
from annotated_mpnet.data.loader import UpdateSource
from annotated_mpnet.data.reservoir import StreamCounts, StreamState
from annotated_mpnet.data.streams import StreamLoader
from annotated_mpnet.data.texts import Text
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.preparation import identity_of
from annotated_mpnet.training.checkpoint import (
    BEST,
    Checkpoint,
    StreamParts,
    TrainState,
    load_checkpoint,
    save_checkpoint,
)
from annotated_mpnet.training.distributed import share_of, whole
from annotated_mpnet.training.optimizer import load_optimizer_tensors, optimizer_tensors
from annotated_mpnet.training.resume import (
    Resumable,
    compare_identity,
    compare_model_config,
    newest_valid_checkpoint,
)
from annotated_mpnet.training.retention import prune
from annotated_mpnet.training.run_directory import EXPORT, RunDirectory
from annotated_mpnet.training.trainer import Evaluation, Progress, Trainer


class Session:
    """The parts of a run that need its directory.

    Attributes:
        identity: what a resume must find unchanged.
    """

    def __init__(
        self,
        config: PretrainingConfig,
        text: Text,
        directory: RunDirectory | None,
        trainer: Trainer,
    ) -> None:
        """Join the parts of a run.

        Args:
            config: all settings.
            text: the text of the run; of a stream, this rank's share.
            directory: the run's, open; None on all ranks but the first, which write nothing.
            trainer: with the network and the optimizer, and with what it tells.
        """
        self.config = config
        self.text = text
        self.directory = directory
        self.trainer = trainer
        self.world = trainer.world
        self.collator = collator_of(config, text)
        self.identity = identity_of(config, text, self.world.size)
        self._stream_counts = StreamCounts()

    def beginning(self) -> Progress:
        """Return where the run stands, with weights and optimizer as they were there.

        Raises:
            CheckpointError: there is no whole checkpoint to go on from, or it is of another run
                than the configuration describes.
            ConfigError: `--allow-change` names something that is never compared.
        """
        resuming = self.config.run.resuming
        found = self._find() if resuming and self.directory is not None else None
        # Refusals first, on rank 0, so that nothing is half put back anywhere.
        known = self.world.first(lambda: None if found is None else self._compare(found))
        if known is None:
            state = TrainState(
                update=0,
                tokens_seen=0,
                predicted_seen=0,
                best_valid_bits=None,
                identity=self.identity,
            )
            return Progress(state)
        state, streams = known
        if not self.is_complete(state):
            tensors = found.checkpoint.optimizer_tensors if found else None
            self.trainer.network.load(found.checkpoint.model_tensors if found else {})
            self._load_optimizer(tensors or {})
        return Progress(state, self._own_stream(streams))

    def is_complete(self, state: TrainState) -> bool:
        """Tell whether a run at this state has nothing left to train."""
        return state.update >= self.config.optimization.total_updates

    def train(self, progress: Progress) -> TrainState:
        """Run the loop from where the run stands to the end."""
        validation = None if self.text.valid is None else partial(self._batches, self.text.valid)
        return self.trainer.train(progress, self.source(), validation, self._save)

    def source(self) -> UpdateSource:
        """Return what feeds this rank's loop."""
        train, batch_size = self.text.train, self.config.optimization.batch_size
        if not isinstance(train, PackedRows):
            return StreamLoader(train, self.collator, batch_size)
        world, seed = self.world, self.config.run.seed
        return BatchLoader(
            train, self.collator, batch_size, seed, rank=world.rank, world_size=world.size
        )

    def test(self) -> Evaluation | None:
        """Load the best model, and measure it once on text that nothing was chosen by."""
        # The test text is looked at once, by the model that the validation text has chosen. Were it
        # looked at during the run, it would help to choose, and prove nothing.
        best = self._load_best() if self.directory is not None else None
        if self.world.first(lambda: best is not None):
            self.trainer.network.load(best.model_tensors if best else {})
        if self.text.test is None:
            return None
        result = self.trainer.evaluate(self._batches(self.text.test))
        self.trainer.tracker.say(
            f"test text: {result.bits:.3f} bits, accuracy {result.accuracy:.3f}"
        )
        return result

    def text_read(self) -> list[str]:
        """Return what became of each text, in lines: of rank 0, which knows of all others."""
        texts = {"training": self.text.train, "validation": self.text.valid, "test": self.text.test}
        return [
            f"{name} text: {rows.report if isinstance(rows, PackedRows) else self._stream_counts}"
            for name, rows in texts.items()
            if rows is not None
        ]

    def export(self) -> Path | None:
        """Export the model in hand, after `test` the best one, if Hugging Face can represent it."""
        model_config = self.trainer.model.config
        if not self.config.run.export_hf:
            return None
        if reasons := conversion.reasons_not_representable(model_config):
            self.trainer.tracker.warn(
                f"no Hugging Face export, which cannot be this model: {'; '.join(reasons)}"
            )
            return None
        tensors = self.trainer.network.whole_tensors()
        return self.world.first(lambda: self._export(tensors))

    def _find(self) -> Resumable:
        """Load the checkpoint to resume from: the one that was named, or the newest valid one."""
        assert self.directory is not None
        wanted = self.config.run.resume_checkpoint
        if wanted is not None:
            # annotated-mpnet's checkpoints were files; its commands name `checkpoint2500.pt`.
            path = wanted if wanted.is_dir() else wanted.with_suffix("")
            return Resumable(path, load_checkpoint(path), [])
        found = newest_valid_checkpoint(self.directory.path, self.directory.run_id)
        if found is None:
            raise CheckpointError(
                f"--resume finds no checkpoint in {self.directory.path}; start the run without it"
            )
        return found

    def _compare(self, found: Resumable) -> tuple[TrainState, list[StreamState]]:
        """Return the state of a checkpoint, and of its stream on each rank, if it may be used."""
        tracker, checkpoint = self.trainer.tracker, found.checkpoint
        for warning in found.warnings:
            tracker.warn(warning)
        changes = compare_model_config(checkpoint.model_config, self.trainer.model.config)
        allowed = self.config.run.allowed_changes
        losses = compare_identity(checkpoint.state.identity, self.identity, allowed)
        state = dataclasses.replace(checkpoint.state, identity=self.identity)
        streams = [] if checkpoint.stream is None else _streams_from(checkpoint.stream)
        if not self.is_complete(state):
            for change in [*changes, *self._changed_settings()]:
                tracker.say(f"changed since the run began: {change}")
            for loss in losses:
                tracker.warn(f"{loss}: from here on this is not exactly the uninterrupted run")
            tracker.say(f"resuming from {found.path}, after update {state.update}")
            if dropped := tracker.rewind(state.update):
                tracker.say(f"{dropped} lines of metrics from behind it were dropped")
        return state, streams

    def _load_optimizer(self, tensors: dict[str, Tensor] | object) -> None:
        """Put rank 0's means and step counts, whole ones, into the optimizers of all ranks."""
        assert isinstance(tensors, dict)
        optimizer, model = self.trainer.optimizer, self.trainer.model
        # `exp_avg.NAME` is cut as the parameter NAME is; a step count is whole everywhere.
        parameters = dict(model.named_parameters())
        shares = {}
        for name, tensor in self.world.spread(tensors):
            parameter = parameters.get(name.partition(".")[2])
            cut = parameter is not None and tensor.dim() > 0
            shares[name] = share_of(parameter, tensor) if cut and parameter is not None else tensor
        load_optimizer_tensors(optimizer, model, shares)

    def _own_stream(self, streams: list[StreamState]) -> StreamState | None:
        """Return where this rank goes on in a stream; None for text on the disk."""
        if not streams:
            return None
        if len(streams) == self.world.size:
            return streams[self.world.rank]
        # Allowed by --allow-change world-size. The shares are others now: those who are furthest
        # say which epoch is begun with, and how many rows have had their masks.
        furthest = max(streams, key=lambda each: each.position.epoch)
        delivered = max(each.delivered for each in streams)
        return dataclasses.replace(furthest, delivered=delivered).restarted(
            self.world.rank, self.world.size
        )

    def _load_best(self) -> Checkpoint | None:
        assert self.directory is not None
        path = self.directory.path / BEST
        if not path.exists():
            return None
        best = load_checkpoint(path, with_optimizer=False)
        self.trainer.tracker.say(f"best model: {path}, after update {best.state.update}")
        return best

    def _export(self, tensors: dict[str, Tensor]) -> Path:
        assert self.directory is not None
        # A network of its own, on the CPU: that of the loop may be shared out, or compiled.
        model = MPNetForPretraining(self.trainer.model.config)
        model.load_state_dict(tensors)
        report = conversion.export_to_hugging_face(
            model, self.directory.path / EXPORT, tokenizer=self.text.tokenizer, overwrite=True
        )
        self.trainer.tracker.say(
            f"Hugging Face model: {report.directory} (logits agree to {report.max_difference:.0e})"
        )
        return report.directory

    # An evaluation keeps no activations for a backward pass: the training's batch size fits.
    def _batches(self, rows: PackedRows) -> Iterator[Batch]:
        batch_size, world = self.config.optimization.batch_size, self.world
        return evaluation_batches(rows, self.collator, batch_size, world.rank, world.size)

    def _changed_settings(self) -> Iterator[str]:
        """Yield what differs from the settings of the run so far, among those that may."""
        assert self.directory is not None
        path = self.directory.path / "config.toml"
        if not path.exists():
            return
        before = tomllib.loads(path.read_text(encoding="utf-8"))
        now = tomllib.loads(to_toml(self.config))
        for group in ("objective", "optimization"):
            for name in sorted(before[group].keys() | now[group].keys()):
                old, new = before[group].get(name), now[group].get(name)
                if old != new:
                    yield f"{name} was {old} and is {new}"

    def _save(self, name: str, progress: Progress) -> None:
        """Write a checkpoint, and delete the oldest ones only after it is safely there."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        means = None
        if self.config.run.save_optimizer_state:
            means = {n: whole(each) for n, each in optimizer_tensors(optimizer, model).items()}
        streams = self.world.gather_objects(progress.stream)
        tensors = self.trainer.network.whole_tensors()
        self.world.first(lambda: self._write(name, progress.state, streams, (tensors, means)))

    def _write(
        self,
        name: str,
        state: TrainState,
        streams: list[StreamState | None],
        tensors: tuple[dict[str, Tensor], dict[str, Tensor] | None],
    ) -> None:
        assert self.directory is not None
        path, run_id = self.directory.path, self.directory.run_id
        known = [each for each in streams if each is not None]
        if known:
            # With each checkpoint, so that an interrupted run has said what it did not train on.
            self._stream_counts = sum((each.counts for each in known), StreamCounts())
            self.trainer.tracker.say(f"read until update {state.update}: {self._stream_counts}")
        checkpoint = Checkpoint(
            run_id=run_id,
            state=state,
            stream=_stream_parts(known),
            model_config=self.trainer.model.config,
            model_tensors=tensors[0],
            optimizer_tensors=tensors[1],
        )
        save_checkpoint(path, name, checkpoint, self._save_tokenizer)
        for warning in prune(path, self.config.run.keep_checkpoints, run_id, protected={name}):
            self.trainer.tracker.warn(warning)

    def _save_tokenizer(self, directory: Path) -> None:
        self.text.tokenizer.save_pretrained(directory)


def collator_of(
    config: PretrainingConfig, text: Text
) -> DataCollatorForMaskedPermutedLanguageModeling:
    """Return what makes batches of a run's rows; its evaluation twin has masks of its own."""
    return DataCollatorForMaskedPermutedLanguageModeling(
        text.vocabulary,
        config.objective,
        config.data.max_tokens,
        config.run.seed,
        packing=config.data.packing,
    )


def _stream_parts(states: list[StreamState]) -> StreamParts | None:
    """Return what a checkpoint keeps of a stream: the ranks' states, side by side."""
    if not states:
        return None
    parts = [state.to_parts() for state in states]
    tensors = {
        f"{rank}.{name}": torch.from_numpy(array)
        for rank, (_, arrays) in enumerate(parts)
        for name, array in arrays.items()
    }
    return {"ranks": [plain for plain, _ in parts]}, tensors


def _streams_from(parts: StreamParts) -> list[StreamState]:
    """Return the states that `_stream_parts` put together.

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
