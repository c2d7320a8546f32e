"""A run in its directory: where it begins, what it saves, what it leaves behind.

The loop (`training/trainer.py`) knows numbers; a directory knows names. A `Session` stands between
the two, and is the same on all ranks: each of its methods is called by all of them, and does the
part that needs a disk on rank 0 only. So the order of what happens can be read here as if there
were one process:

                 rank 0                                      the others
    ---------    -----------------------------------------   ----------------------------------
    beginning    finds a checkpoint, verifies, compares it   wait; take over state and tensors
    train        makes updates, has them saved               the same, and hand over their shares
    test         loads the best model; measures              take it over; measure other rows
    export       writes the best model as Hugging Face's     hand over their shares

In code that looks like this, again and again: `if self.directory is not None` for what only rank 0
can do, `world.first(...)` for what it does while the others wait, and exchanges outside of both. An
exchange within one of them would be made by rank 0 alone, and wait for ever.

**Refusals first.** A resume can fail in three ways: no checkpoint is whole, it is another run's, or
the run has become another one by its flags. All of that is found out on rank 0, before a single
weight is put anywhere. And a checkpoint of a run that is complete is compared too, but its tensors
are not loaded: the run is left as it is.

**What travels between ranks.** A checkpoint is read once, by rank 0, and its tensors are sent to
the others, so that a machine without a view of the disk can take part: of MPNet-base, the network
and AdamW's two means, in GB

>>> round(109_518_527 * (4 + 8) / 1e9, 1)
1.3

On the way back, tensors are put together from the shares of all ranks if there are shares (--fsdp),
one at a time, and kept by rank 0 alone; each rank's place in a stream is collected, a few megabytes
each.

**Which model is tested?** The best one, not the last one: validation text has chosen it, and the
test text is looked at once, afterwards. Looked at during the run it would help to choose, and its
loss would no longer be that of text that the model has never met in any way. The same model is then
exported, so that what is tested is what is used.

Next: `training/saving.py`, which writes beside the loop; `training/checkpoint.py` for what is
written; `run.py`, which builds all this.
"""

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

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
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.preparation import identity_of
from annotated_mpnet.training.checkpoint import (
    BEST,
    Checkpoint,
    TrainState,
    load_checkpoint,
)
from annotated_mpnet.training.distributed import share_of
from annotated_mpnet.training.optimizer import load_optimizer_tensors
from annotated_mpnet.training.resume import (
    Resumable,
    compare_identity,
    compare_model_config,
    newest_valid_checkpoint,
)
from annotated_mpnet.training.run_directory import EXPORT, RunDirectory, nothing_to_resume
from annotated_mpnet.training.saving import Saver, streams_from
from annotated_mpnet.training.trainer import Evaluation, Progress, Trainer


class Session:
    """The parts of a run that need its directory.

    In the order in which `run.py` calls them: `beginning`, `train`, `test`, `export`, `text_read`.
    Each is called by all ranks, or by none.

    Attributes:
        config: all settings.
        text: of the run; of a stream, this rank's share.
        directory: the run's; None on all ranks but the first.
        trainer: the loop.
        world: the ranks.
        collator: makes batches of rows.
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

        A new run stands at update 0, with the weights that `initial_weights.py` has given it, and
        there is nothing to load. On a resume the identity is the present one, and not that of the
        checkpoint: what --allow-change has permitted once need not be permitted again.

        Returns:
            The state, the same on all ranks, and this rank's place in the stream.

        Raises:
            CheckpointError: there is no whole checkpoint to go on from, or it is of another run
                than the configuration describes.
            ConfigError: `--allow-change` names something that is never compared.
        """
        resuming = self.config.run.resuming
        found = self._find() if resuming and self.directory is not None else None
        # Refusals first, on rank 0, so that nothing is half put back anywhere. From here on `known`
        # says on all ranks what `found` says only there: whether there is something to go on from.
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
        # Gigabytes that nobody would train on are not sent around.
        if not self.is_complete(state):
            tensors = found.checkpoint.optimizer_tensors if found else None
            self.trainer.network.load(found.checkpoint.model_tensors if found else {})
            self._load_optimizer(tensors or {})
        return Progress(state, self._own_stream(streams))

    def is_complete(self, state: TrainState) -> bool:
        """Tell whether a run at this state has nothing left to train.

        A larger --total-updates gives it something again: the number is no part of the identity.
        """
        return state.update >= self.config.optimization.total_updates

    def train(self, progress: Progress) -> TrainState:
        """Run the loop from where the run stands to the end.

        Validation batches are made anew for each evaluation, in the same order and with the same
        masks (`data/loader.py`): to keep them would take more memory than to make them takes time.
        """
        validation = None if self.text.valid is None else partial(self._batches, self.text.valid)
        with Saver(self.trainer, self.directory, self._save_tokenizer) as saver:
            state = self.trainer.train(progress, self.source(), validation, saver)
        self._stream_counts = saver.stream_counts
        return state

    def source(self) -> UpdateSource:
        """Return what feeds this rank's loop.

        Rows on the disk are shared out by the loader: of the batches k, k + 1, ... of an update,
        each rank takes its own. A stream was shared out when it was opened (`data/texts.py`):
        nobody could reach row number k of it without reading all rows before.
        """
        train, batch_size = self.text.train, self.config.optimization.batch_size
        if not isinstance(train, PackedRows):
            return StreamLoader(train, self.collator, batch_size)
        world, seed = self.world, self.config.run.seed
        return BatchLoader(
            train, self.collator, batch_size, seed, rank=world.rank, world_size=world.size
        )

    def test(self) -> Evaluation | None:
        """Load the best model, and measure it once on text that nothing was chosen by.

        Without validation there is no best model, and the last one stays in hand. It is loaded even
        without a test text, for the export.

        Returns:
            Bits and accuracy; None without a test text.
        """
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
        """Return what became of each text, in lines: of rank 0, which knows of all others.

        Text on the disk was counted when it was packed. Of a stream it is the counts of the last
        checkpoint: those of this moment would count what was read ahead and never trained on.
        """
        texts = {"training": self.text.train, "validation": self.text.valid, "test": self.text.test}
        return [
            f"{name} text: {rows.report if isinstance(rows, PackedRows) else self._stream_counts}"
            for name, rows in texts.items()
            if rows is not None
        ]

    def export(self) -> Path | None:
        """Export the model in hand, after `test` the best one, if Hugging Face can represent it.

        What it cannot represent (pre-norm, other buckets, ...) is no reason to fail at the end of a
        run: that was said at its beginning, too (`initial_weights.check_export`), and the
        checkpoints are there.

        Returns:
            The directory; None if there is no export.
        """
        model_config = self.trainer.model.config
        if not self.config.run.export_hf:
            return None
        if reasons := conversion.reasons_not_representable(model_config):
            self.trainer.tracker.warn(
                f"no Hugging Face export, which cannot be this model: {'; '.join(reasons)}"
            )
            return None
        tensors = self.world.collect(self.trainer.model.state_dict())
        return self.world.first(lambda: self._export(tensors))

    def _find(self) -> Resumable:
        """Load the checkpoint to resume from: the one that was named, or the newest valid one.

        Whoever names one means that one. So a damaged one is an error here, where the search would
        go on to the next older.
        """
        assert self.directory is not None
        wanted = self.config.run.resume_checkpoint
        if wanted is not None:
            # annotated-mpnet's checkpoints were files; its commands name `checkpoint2500.pt`.
            path = wanted if wanted.is_dir() else wanted.with_suffix("")
            return Resumable(path, load_checkpoint(path), [])
        found = newest_valid_checkpoint(self.directory.path, self.directory.run_id)
        if found is None:
            raise nothing_to_resume(self.directory.path)
        return found

    def _compare(self, found: Resumable) -> tuple[TrainState, list[StreamState]]:
        """Return the state of a checkpoint, and of its stream on each rank, if it may be used.

        Says what is different from before. There are three kinds of difference: another network is
        refused, another identity is refused unless --allow-change names it, and what else decides
        an update (learning rate, dropout, ...) is told as a fact.
        """
        tracker, checkpoint = self.trainer.tracker, found.checkpoint
        for warning in found.warnings:
            tracker.warn(warning)
        changes = compare_model_config(checkpoint.model_config, self.trainer.model.config)
        allowed = self.config.run.allowed_changes
        losses = compare_identity(checkpoint.state.identity, self.identity, allowed)
        state = dataclasses.replace(checkpoint.state, identity=self.identity)
        streams = [] if checkpoint.stream is None else streams_from(checkpoint.stream)
        if not self.is_complete(state):
            for change in [*changes, *self._changed_settings()]:
                tracker.say(f"changed since the run began: {change}")
            for loss in losses:
                tracker.warn(f"{loss}: from here on this is not exactly the uninterrupted run")
            tracker.say(f"resuming from {found.path}, after update {state.update}")
            # The updates behind the checkpoint are made again, and log their lines again.
            if dropped := tracker.rewind(state.update):
                tracker.say(f"{dropped} lines of metrics from behind it were dropped")
        return state, streams

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Put rank 0's means and step counts, whole ones, into the optimizers of all ranks.

        Under the names of `optimizer_tensors`, of which the first part says what it is and the rest
        whose:

        >>> "exp_avg.lm_head.dense.weight".partition(".")[::2]
        ('exp_avg', 'lm_head.dense.weight')

        Args:
            tensors: on rank 0; nothing on the others.
        """
        optimizer, model = self.trainer.optimizer, self.trainer.model
        # A mean has the shape of its parameter and is cut as that is; a step count is a scalar, and
        # whole everywhere.
        parameters = dict(model.named_parameters())
        shares = {}
        for name, tensor in self.world.spread(tensors):
            parameter = parameters.get(name.partition(".")[2])
            if parameter is not None and tensor.dim() > 0:
                tensor = share_of(parameter, tensor)
            shares[name] = tensor
        load_optimizer_tensors(optimizer, model, shares)

    def _own_stream(self, streams: list[StreamState]) -> StreamState | None:
        """Return where this rank goes on in a stream; None for text on the disk.

        Each rank takes its own state out of those of all, by its number: with 8 ranks as with 1.
        Another number of ranks is part of another identity, and comes here only if it was allowed.

        Args:
            streams: of all ranks of the former run, in their order.
        """
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
        """Load the best model, verified, without AdamW's means, which are two thirds of it.

        From the disk, although the network in hand may be the same: what is tested and exported is
        then what is kept. None if no validation was ever made.
        """
        assert self.directory is not None
        path = self.directory.path / BEST
        if not path.exists():
            return None
        best = load_checkpoint(path, with_optimizer=False)
        self.trainer.tracker.say(f"best model: {path}, after update {best.state.update}")
        return best

    def _export(self, tensors: dict[str, Tensor]) -> Path:
        """Write the Hugging Face model into `hf/`, which is proven to compute the same logits.

        Over a former export: of an interrupted start of the same run, to which the directory
        belongs.
        """
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

    def _batches(self, rows: PackedRows) -> Iterator[Batch]:
        """Yield this rank's batches of an evaluation.

        It keeps no activations for a backward pass: the training's batch size fits.
        """
        batch_size, world = self.config.optimization.batch_size, self.world
        return evaluation_batches(rows, self.collator, batch_size, world.rank, world.size)

    def _changed_settings(self) -> Iterator[str]:
        """Yield what differs from the settings of the run so far, among those that may.

        Read off the `config.toml` that the former start has left. The present one is written only
        behind this (`run.py`). A file is compared with a file, so that a setting is spelled in the
        same way in both; one that is unset has no line, and is None here.
        """
        assert self.directory is not None
        path = self.directory.path / "config.toml"
        if not path.exists():
            return
        before = tomllib.loads(path.read_text(encoding="utf-8"))
        now = tomllib.loads(to_toml(self.config))
        # Only what decides an update. Of the other groups, some cannot change (the architecture),
        # some are in the identity (the data), and the rest decides nothing (the machine, records).
        for group in ("objective", "optimization"):
            for name in sorted(before[group].keys() | now[group].keys()):
                old, new = before[group].get(name), now[group].get(name)
                if old == new:
                    continue
                if name in ("head_bias", "relative_bias_init"):
                    # They decide how weights start. A run from before the latter has no word of it.
                    if old is not None:
                        yield f"{name} was {old} and is {new}: no effect, the weights are loaded"
                else:
                    yield f"{name} was {old} and is {new}"

    def _save_tokenizer(self, directory: Path) -> None:
        # Into each checkpoint: weights without their vocabulary are numbers without a meaning, and
        # the place where the tokenizer came from may be gone by the time that somebody needs it.
        self.text.tokenizer.save_pretrained(directory)


def collator_of(
    config: PretrainingConfig, text: Text
) -> DataCollatorForMaskedPermutedLanguageModeling:
    """Return what makes batches of a run's rows; its evaluation twin has masks of its own.

    The seed is the run's: masks are a function of it, of the epoch and of the row, and so of
    nothing that a resume, a number of ranks or a batch size could change.
    """
    return DataCollatorForMaskedPermutedLanguageModeling(
        text.vocabulary,
        config.objective,
        config.data.max_tokens,
        config.run.seed,
        packing=config.data.packing,
    )
