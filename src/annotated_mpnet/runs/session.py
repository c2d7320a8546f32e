"""A run in its directory: resume, train, test, export.

Every method of a `Session` is called by all ranks. What needs a disk is done by rank 0 alone:

               rank 0                                      the other ranks
    -------    -----------------------------------------   -----------------------------------
    restore    finds a checkpoint, verifies, compares it   wait; receive the state and tensors
    train      makes updates, writes checkpoints           make updates, send their shards
    test       loads the best model, measures it           receive it, measure other sequences
    export     writes the best model for Hugging Face      send their shards

So the same pattern returns: `if self.directory is not None` for what only rank 0 does,
`world.on_rank_0(...)` for what the others wait for, and exchanges outside of both. An exchange
inside one of them would hang.

A checkpoint is read once, by rank 0, and its tensors are sent to the others, so only one machine
needs to see the disk. On resume everything is compared before a single weight is loaded.

**Which model is tested?** The best one, which validation text has chosen. The test text is looked
at once, after training, so it cannot influence any choice. The same model is exported.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from annotated_mpnet import conversion
from annotated_mpnet.checkpoints.checkpoint import (
    BEST,
    Checkpoint,
    IdentityValue,
    TrainState,
    load_checkpoint,
)
from annotated_mpnet.checkpoints.optimizer_state import load_optimizer_tensors
from annotated_mpnet.checkpoints.resume import (
    Resumable,
    changed_settings,
    checkpoint_path,
    compare_identity,
    compare_model_config,
    newest_valid_checkpoint,
)
from annotated_mpnet.checkpoints.run_directory import EXPORT, RunDirectory, nothing_to_resume
from annotated_mpnet.checkpoints.saving import Saver
from annotated_mpnet.conversion.kept import from_export_files, to_export_files, with_progress
from annotated_mpnet.conversion.model_card import CardFacts
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.loop import Evaluation, Progress
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.hooks import RunHooks, state_of
from annotated_mpnet.runs.masked_words import choose_words, guess_words
from annotated_mpnet.runs.texts import Text
from annotated_mpnet.settings.config import PretrainingConfig, RunConfig
from annotated_mpnet.settings.config_file import to_toml
from annotated_mpnet.signals import Stopped, listening
from annotated_mpnet.streams.reservoir import StreamCounts, StreamState
from annotated_mpnet.streams.streams import StreamLoader
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.tokenizer import write_tokenizer
from annotated_mpnet.tracking.report import REPORT
from annotated_mpnet.tracking.tracker import Tracker
from annotated_mpnet.training.distributed import full_tensor, shard
from annotated_mpnet.training.loader import (
    BatchLoader,
    Update,
    UpdateSource,
    evaluation_batches,
    pinned,
    prefetch,
)
from annotated_mpnet.training.trainer import Trainer

PREFETCHED_UPDATES = 2
"""Updates whose batches are made ahead. One would do if all took the same time; the second makes up
for a batch that takes longer. A paper-sized update takes 44 MB."""


@dataclass
class Session:
    """The parts of a run that need its directory, called in the order of the methods.

    Attributes:
        run: the settings of checkpoints, resuming and the export.
        identity: what must be the same on resume.
        text: of the run; of a stream, this rank's share.
        collator: makes batches. Its masks are a function of seed, epoch and sequence, so a resume
            cannot change them.
        directory: the run's, open; None on all ranks but rank 0, which alone writes.
        trainer: the loop, with network and optimizer.
        tracker: where metrics and messages go.
        logging_steps: updates between two lines of metrics.
        facts: what the model card says about the run; a resume adds the base from its checkpoint.
        modules: of a sentence encoder, what its exports keep; on resume those of the checkpoint.
    """

    run: RunConfig
    identity: dict[str, IdentityValue]
    text: Text
    collator: DataCollatorForMaskedPermutedLanguageModeling
    directory: RunDirectory | None
    trainer: Trainer
    tracker: Tracker
    logging_steps: int
    facts: CardFacts
    modules: Mapping[str, bytes]

    def __post_init__(self) -> None:
        self.world = self.trainer.world
        self._start = self._end = Progress()
        self._best: Checkpoint | None = None
        self._stream_counts = StreamCounts()

    def restore(self, settings: str) -> TrainState:
        """Load the checkpoint to resume from, if this is a resume; return where the run stands.

        The tensors of a finished run are not loaded.

        Args:
            settings: what `config.toml` will be, to say what has changed.

        Raises:
            CheckpointError: there is no valid checkpoint, or it belongs to another run.
            ConfigError: --allow-change names something that is never compared.
        """
        resuming = self.run.resuming and self.directory is not None
        found = self._find_checkpoint() if resuming else None
        known = self.world.on_rank_0(
            lambda: None if found is None else self._compare(found, settings)
        )
        if known is None:
            return state_of(self._start, self.identity)
        state, streams = known
        if not self.is_finished(state):
            self.trainer.network.load(found.checkpoint.model_tensors if found else {})
            self._load_optimizer((found and found.checkpoint.optimizer_tensors) or {})
        best = state.best_valid_bits
        self._start = Progress(
            state.update,
            state.tokens_seen,
            state.predicted_seen,
            math.inf if best is None else best,
            self._own_stream(streams),
            state.evaluation_due,
        )
        self._stream_counts = sum((each.counts for each in streams), StreamCounts())
        return state

    def is_finished(self, state: TrainState) -> bool:
        """Return whether nothing is left to do, neither an update nor the export nor the report.

        The report is written last. A larger --total-updates makes a finished run unfinished.
        """
        return self.world.on_rank_0(lambda: self._is_finished(state))

    def train(self) -> TrainState:
        """Run the loop from where the run stands to the last update.

        Raises:
            DivergedError: the loss or the gradient is NaN or infinite; it was not applied.
            DataError: the text broke off; after a checkpoint.
            Stopped: a signal asked for it; after a checkpoint.
            WriteError: a checkpoint could not be written.
        """
        valid = self.text.valid
        validation = None if valid is None else partial(self._evaluation_batches, valid)
        with Saver(self.trainer, self.directory, self.run, self._save_tokenizer) as saver:
            hooks = RunHooks(
                self.trainer,
                self.tracker,
                saver,
                self._start,
                self.identity,
                validation,
                partial(guess_words, self.trainer, choose_words(self.text), self.text),
                self.run,
                self.logging_steps,
                self._export_files,
            )
            # Closed after an error too, or the thread would go on reading. Signals are only noted
            # from here on.
            with closing(self._updates_ahead()) as ahead, listening(hooks.request):
                progress = self.trainer.train(self._start, hooks.updates(ahead), hooks)
                saver.finish()
        self._end = progress
        if progress.update > self._start.update:
            self._stream_counts = saver.stream_counts
        # Also if the signal came after the last update: test, export and report are not begun.
        if hooks.should_stop():
            assert hooks.stopped_by is not None
            how = "the same command" if self.run.autoresume else "--resume"
            self.tracker.say(f"saved after update {progress.update}; continue with {how}")
            raise Stopped(hooks.stopped_by)
        return state_of(progress, self.identity)

    def source(self) -> UpdateSource:
        """Return what feeds this rank's loop.

        Of the batches of an update, each rank takes its own. A stream was split when it was opened
        (`runs/texts.py`), because sequence k cannot be reached without reading all before it.
        """
        train, batch_size = self.text.train, self.trainer.optimization.batch_size
        if not isinstance(train, PackedSequences):
            return StreamLoader(train, self.collator, batch_size)
        world, seed = self.world, self.run.seed
        return BatchLoader(
            train, self.collator, batch_size, seed, rank=world.rank, world_size=world.size
        )

    def test(self) -> Evaluation | None:
        """Load the best model, if there was a validation, and measure it on the test text.

        Returns:
            Bits and accuracy; None without a test text.
        """
        best = self._load_best() if self.directory is not None else None
        if self.world.on_rank_0(lambda: best is not None):
            self.trainer.network.load(best.model_tensors if best else {})
        # The export needs what it says of itself, but not its weights once more.
        self._best = best and replace(best, model_tensors={})
        if self.text.test is None:
            return None
        result = self.trainer.evaluate(self._evaluation_batches(self.text.test))
        self.facts = replace(self.facts, test_bits=result.bits, test_accuracy=result.accuracy)
        self.tracker.say(f"test text: {result.bits:.3f} bits, accuracy {result.accuracy:.3f}")
        return result

    def export(self) -> Path | None:
        """Export the model in hand (after `test`, the best one) for Hugging Face.

        Returns:
            The directory; None if no export is wanted, or if Hugging Face's architecture cannot
            represent the model, which the run has said at its beginning too.
        """
        if not self.run.export_hf:
            return None
        if reasons := self._cannot_export():
            self.tracker.warn(
                f"no Hugging Face export, which cannot be this model: {'; '.join(reasons)}"
            )
            return None
        tensors = {}
        for name, tensor in self.trainer.model.state_dict().items():
            # One tensor at a time is whole on a device, and only rank 0 keeps it.
            full = full_tensor(tensor)
            if self.world.is_first:
                tensors[name] = full.cpu()
        return self.world.on_rank_0(lambda: self._write_export(tensors))

    def text_report(self) -> list[str]:
        """Return a line about each text. Called on rank 0, which knows the counts of all ranks.

        Files were counted when they were packed. The counts of a stream are those of the last
        checkpoint, because later ones include what was read ahead and never trained on.
        """
        counts = self._stream_counts
        texts = {"training": self.text.train, "validation": self.text.valid, "test": self.text.test}
        return [
            f"{name} text: {text.report if isinstance(text, PackedSequences) else counts}"
            for name, text in texts.items()
            if text is not None
        ]

    def _is_finished(self, state: TrainState) -> bool:
        return (
            state.update >= self.trainer.optimization.total_updates
            and not state.evaluation_due
            and self._has(REPORT)
            and (self._has(EXPORT) or not self.run.export_hf or bool(self._cannot_export()))
        )

    def _has(self, name: str) -> bool:
        return self.directory is not None and (self.directory.path / name).exists()

    def _cannot_export(self) -> list[str]:
        return conversion.reasons_not_representable(self.trainer.model.config)

    def _find_checkpoint(self) -> Resumable:
        """Load the checkpoint that --resume-checkpoint names, or else the newest valid one.

        A named one that is damaged is an error; the search would take the next older one.
        """
        assert self.directory is not None
        wanted = self.run.resume_checkpoint
        if wanted is not None:
            path = checkpoint_path(wanted)
            return Resumable(path, load_checkpoint(path), [])
        found = newest_valid_checkpoint(self.directory.path, self.directory.run_id)
        if found is None:
            raise nothing_to_resume(self.directory.path)
        return found

    def _compare(self, found: Resumable, settings: str) -> tuple[TrainState, Sequence[StreamState]]:
        """Refuse the checkpoint of another run, and say what has changed in this one.

        Another network is refused. Another identity is refused unless --allow-change names it. The
        state gets the present identity, so what was allowed once need not be allowed again.

        Returns:
            The state, and that of the stream on each rank.
        """
        tracker, checkpoint = self.tracker, found.checkpoint
        for warning in found.warnings:
            tracker.warn(warning)
        self.modules, kept = from_export_files(checkpoint)
        self.facts = replace(self.facts, base=kept.base, base_on_hub=kept.base_on_hub)
        changes = compare_model_config(checkpoint.model_config, self.trainer.model.config)
        allowed = self.run.allowed_changes
        losses = compare_identity(checkpoint.state.identity, self.identity, allowed)
        state = replace(checkpoint.state, identity=self.identity)
        if not self._is_finished(state):
            for change in [*changes, *self._changed_settings(settings)]:
                tracker.say(f"changed since the run began: {change}")
            for loss in losses:
                tracker.warn(f"{loss}: from here on this is not exactly the uninterrupted run")
            tracker.say(f"resuming from {found.path}, after update {state.update}")
            if dropped := tracker.rewind(state.update, evaluation_due=state.evaluation_due):
                tracker.say(f"{dropped} lines of metrics after it were dropped")
        return state, checkpoint.streams

    def _changed_settings(self, settings: str) -> list[str]:
        assert self.directory is not None
        path = self.directory.path / "config.toml"
        try:
            return list(changed_settings(path, settings, to_toml(PretrainingConfig())))
        # The checkpoints are whole, and the file is only used to say what has changed.
        except (OSError, ValueError) as error:
            self.tracker.warn(f"{path} cannot be compared with the settings now: {error}")
            return []

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy rank 0's means and step counts into the optimizers of all ranks, as their shards.

        Args:
            tensors: on rank 0, named like `exp_avg.lm_head.dense.weight`; ignored on the others.
        """
        model = self.trainer.model
        parameters = dict(model.named_parameters())
        own = {}
        for name, tensor in self.world.broadcast(tensors):
            parameter = parameters.get(name.partition(".")[2])
            # A mean is split like its parameter. A step count is a scalar, and never split.
            if parameter is not None and tensor.dim() > 0:
                tensor = shard(tensor, parameter)
            own[name] = tensor
        load_optimizer_tensors(self.trainer.optimizer, model, own)

    def _own_stream(self, streams: Sequence[StreamState]) -> StreamState | None:
        """Return where this rank resumes in a stream; None for text on the disk.

        Args:
            streams: of all ranks of the previous run, in order of ranks.
        """
        if not streams:
            return None
        if len(streams) == self.world.size:
            return streams[self.world.rank]
        # Allowed by --allow-change world-size. The split is another one now, so the ranks begin the
        # epoch of the furthest anew, with masks that were not used before.
        furthest = max(streams, key=lambda each: each.position.epoch)
        delivered = max(each.delivered for each in streams)
        return replace(furthest, delivered=delivered).restarted(self.world.rank, self.world.size)

    def _updates_ahead(self) -> Generator[Update]:
        """Yield updates that a thread makes ahead, for a GPU in pinned memory."""
        device, start = self.trainer.network.device, self._start
        updates = self.source().updates(
            start.update, self.trainer.optimization.update_freq, start.text
        )
        return prefetch(
            pinned(updates, device) if device.type == "cuda" else updates, PREFETCHED_UPDATES
        )

    def _evaluation_batches(self, text: PackedSequences) -> Iterator[Batch]:
        # Without activations for a backward pass, the training's batch size fits.
        batch_size, world = self.trainer.optimization.batch_size, self.world
        batches = evaluation_batches(text, self.collator, batch_size, world.rank, world.size)
        total = len(range(0, len(text), batch_size * world.size))
        for done, batch in enumerate(batches):
            self.tracker.evaluating(done, total)
            yield batch

    def _save_tokenizer(self, directory: Path) -> None:
        # Into each checkpoint: the place it came from may be gone one day.
        write_tokenizer(self.text.tokenizer, directory)

    def _load_best(self) -> Checkpoint | None:
        """Load the best model from the disk, so what is tested is what is kept."""
        assert self.directory is not None
        path = self.directory.path / BEST
        if not path.exists():
            return None
        best = load_checkpoint(path, to_resume=False)
        self.tracker.say(f"best model: {path}, after update {best.state.update}")
        return best

    def _export_files(self, evaluation: Evaluation | None) -> Mapping[str, bytes]:
        facts = self.facts
        if evaluation is not None:
            facts = replace(facts, valid_bits=evaluation.bits, valid_accuracy=evaluation.accuracy)
        return to_export_files(facts, self.modules)

    def _write_export(self, tensors: dict[str, Tensor]) -> Path | None:
        """Write `hf/`, which is proven to compute the same logits, over an earlier export.

        With files of the user's in it, `hf/` is left as it is.
        """
        assert self.directory is not None
        # A network of its own on the CPU: that of the loop may be sharded or compiled.
        model = MPNetForPretraining(self.trainer.model.config)
        model.load_state_dict(tensors)
        if self._best is None:
            facts = with_progress(self.facts, state_of(self._end, self.identity))
        else:
            _, best = from_export_files(self._best)
            facts = replace(
                with_progress(self.facts, self._best.state),
                valid_bits=self._best.state.best_valid_bits,
                valid_accuracy=best.valid_accuracy,
            )
        try:
            report = conversion.export_to_hugging_face(
                model,
                self.directory.path / EXPORT,
                tokenizer=self.text.tokenizer,
                overwrite=True,
                modules=self.modules,
                facts=facts,
            )
        except ConfigError as error:
            self.tracker.warn(f"no Hugging Face export: {error}")
            return None
        self.tracker.say(
            f"Hugging Face model: {report.directory} (logits agree to {report.max_difference:.0e})"
        )
        return report.directory
