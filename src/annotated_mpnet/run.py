"""A whole run: everything that stands around the loop.

    configuration -> tokenizer -> rows of tokens -> network -> (resume) -> loop -> test -> export

Each step can fail because of something that its user can mend, so the cheap ones come first: a
wrong flag is found before a file is read, a taken directory before text is tokenised, and the
directory is not written to before the first update is about to begin.

A run is fixed by its data, seed, batch, row length, masking and tokenizer. They are its *identity*,
kept in each checkpoint; a resume with another identity is refused, naming what differs, unless
`--allow-change` permits it. Learning rate, schedule and dropout may change: that is then said.

Next: `tracking.py` for what is recorded, `conversion/` for the way out to Hugging Face.
"""

import dataclasses
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

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
from annotated_mpnet.data.reservoir import StreamState
from annotated_mpnet.data.streams import StreamLoader
from annotated_mpnet.data.texts import Text, read_text
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.preparation import (
    Plateau,
    build_model,
    choose_device,
    identity_of,
    measure_plateau,
    plan,
)
from annotated_mpnet.training.checkpoint import (
    BEST,
    Checkpoint,
    StreamParts,
    TrainState,
    load_checkpoint,
    save_checkpoint,
)
from annotated_mpnet.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from annotated_mpnet.training.resume import (
    Resumable,
    compare_identity,
    compare_model_config,
    newest_valid_checkpoint,
)
from annotated_mpnet.training.retention import prune
from annotated_mpnet.training.run_directory import RunDirectory, refuse_taken_directory
from annotated_mpnet.training.tracking import Tracker
from annotated_mpnet.training.trainer import Evaluation, Progress, Trainer


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        directory: the run's.
        state: behind its last update.
        plateau: what guessing by frequency reaches on the validation text; None without one.
        test: the best model on the test text; None without one.
        export: the Hugging Face model; None if it was not wanted or cannot be represented.
    """

    directory: Path
    state: TrainState
    plateau: Plateau | None
    test: Evaluation | None
    export: Path | None


def run_pretraining(config: PretrainingConfig, console: Console | None = None) -> RunResult:
    """Run a whole pretraining.

    Args:
        config: all settings.
        console: where to report; standard output if not given.

    Raises:
        UserError: one of its kinds, with one line for the user.
        Stopped: a signal asked for it.
    """
    console = console or Console()
    # What costs nothing to find out comes first.
    config.validate()
    device, bf16 = choose_device(config)
    where = (config.run.checkpoint_dir, _resumes_here(config), config.run.overwrite)
    refuse_taken_directory(*where)
    # Minutes may pass here, with a large text that is not in the cache yet.
    text = read_text(config.data, config.run.seed)
    model, notes = build_model(config, text)
    model.to(device)
    optimizer = build_optimizer(model, config.optimization, device)

    # From here on the directory is locked, and written to.
    with RunDirectory(*where) as directory:
        tracker = Tracker(directory.path, config.optimization.total_updates, console)
        run = _Run(config, text, directory, Trainer(model, optimizer, config, bf16, tracker))
        found = run.find_checkpoint() if config.run.resuming else None
        if found is not None and run.is_complete(found.checkpoint.state):
            # Said, but not kept: a run that is complete is left as it is, to the byte.
            console.print(
                f"the run in {directory.path} is complete, with {found.checkpoint.state.update} "
                "updates; a larger --total-updates would go on with it",
                highlight=False,
            )
            return RunResult(directory.path, found.checkpoint.state, None, None, None)
        for line in [*notes, *plan(config, text, model, device, bf16)]:
            tracker.say(line)
        progress = run.fresh_start() if found is None else run.resume(found)
        # Only now: what changed since the run began was read off the former file.
        directory.write("config.toml", to_toml(config))
        plateau = measure_plateau(text)
        if plateau is not None:
            tracker.say(
                f"unigram plateau on the validation text: {plateau.bits:.2f} bits, accuracy "
                f"{plateau.accuracy:.3f}: what guessing by frequency reaches"
            )
        with tracker:
            state = run.train(progress)
        return RunResult(directory.path, state, plateau, run.test(), run.export())


class _Run:
    """The parts of a run that need its directory: resume, checkpoints, test, export.

    Attributes:
        collator: makes batches; its evaluation twin has masks of its own, the same each time.
        identity: what a resume must find unchanged.
    """

    def __init__(
        self, config: PretrainingConfig, text: Text, directory: RunDirectory, trainer: Trainer
    ) -> None:
        self.config = config
        self.text = text
        self.directory = directory
        self.trainer = trainer
        self.collator = DataCollatorForMaskedPermutedLanguageModeling(
            text.vocabulary,
            config.objective,
            config.data.max_tokens,
            config.run.seed,
            packing=config.data.packing,
        )
        self.identity = identity_of(config, text)

    def fresh_start(self) -> Progress:
        """Return where a run stands before its first update."""
        state = TrainState(
            update=0, tokens_seen=0, predicted_seen=0, best_valid_bits=None, identity=self.identity
        )
        return Progress(state)

    def find_checkpoint(self) -> Resumable:
        """Load the checkpoint to resume from: the one that was named, or the newest valid one."""
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

    def is_complete(self, state: TrainState) -> bool:
        """Tell whether a run at this state has nothing left to train."""
        return state.update >= self.config.optimization.total_updates

    def resume(self, found: Resumable) -> Progress:
        """Put weights and optimizer back as they were; return where the run stands there.

        Raises:
            CheckpointError: the checkpoint is of another run than the configuration describes.
        """
        model, tracker, checkpoint = self.trainer.model, self.trainer.tracker, found.checkpoint
        for warning in found.warnings:
            tracker.warn(warning)
        assert checkpoint.optimizer_tensors is not None  # load_checkpoint refuses to do without
        # Refusals first, so that nothing is half put back.
        changes = compare_model_config(checkpoint.model_config, model.config)
        allowed = self.config.run.allowed_changes
        losses = compare_identity(checkpoint.state.identity, self.identity, allowed)
        model.load_state_dict(checkpoint.model_tensors)
        load_optimizer_tensors(self.trainer.optimizer, model, checkpoint.optimizer_tensors)
        for change in [*changes, *self._changed_settings()]:
            tracker.say(f"changed since the run began: {change}")
        for loss in losses:
            tracker.warn(f"{loss}: from here on this is not exactly the uninterrupted run")
        tracker.say(f"resuming from {found.path}, after update {checkpoint.state.update}")
        if dropped := tracker.rewind(checkpoint.state.update):
            tracker.say(f"{dropped} lines of metrics from behind it were dropped")
        return Progress(
            dataclasses.replace(checkpoint.state, identity=self.identity),
            None if checkpoint.stream is None else _stream_from(checkpoint.stream),
        )

    def train(self, progress: Progress) -> TrainState:
        """Run the loop from where the run stands to the end."""
        train, batch_size = self.text.train, self.config.optimization.batch_size
        source: UpdateSource
        if isinstance(train, PackedRows):
            source = BatchLoader(train, self.collator, batch_size, self.config.run.seed)
        else:
            source = StreamLoader(train, self.collator, batch_size)
        validation = None if self.text.valid is None else partial(self._batches, self.text.valid)
        return self.trainer.train(progress, source, validation, self._save)

    def test(self) -> Evaluation | None:
        """Load the best model, and measure it once on text that nothing was chosen by."""
        # The test text is looked at once, by the model that the validation text has chosen. Were it
        # looked at during the run, it would help to choose, and prove nothing.
        path = self.directory.path / BEST
        if path.exists():
            best = load_checkpoint(path, with_optimizer=False)
            self.trainer.model.load_state_dict(best.model_tensors)
            self.trainer.tracker.say(f"best model: {path}, after update {best.state.update}")
        if self.text.test is None:
            return None
        result = self.trainer.evaluate(self._batches(self.text.test))
        self.trainer.tracker.say(
            f"test text: {result.bits:.3f} bits, accuracy {result.accuracy:.3f}"
        )
        return result

    def export(self) -> Path | None:
        """Export the model in hand, after `test` the best one, if Hugging Face can represent it."""
        tracker, model = self.trainer.tracker, self.trainer.model
        if not self.config.run.export_hf:
            return None
        if reasons := conversion.reasons_not_representable(model.config):
            tracker.warn(
                f"no Hugging Face export, which cannot be this model: {'; '.join(reasons)}"
            )
            return None
        report = conversion.export_to_hugging_face(
            model, self._export_path, tokenizer=self.text.tokenizer, overwrite=True
        )
        tracker.say(
            f"Hugging Face model: {report.directory} (logits agree to {report.max_difference:.0e})"
        )
        return report.directory

    @property
    def _export_path(self) -> Path:
        return self.directory.path / "hf"

    # An evaluation keeps no activations for a backward pass: the training's batch size fits.
    def _batches(self, rows: PackedRows) -> Iterator[Batch]:
        return evaluation_batches(rows, self.collator, self.config.optimization.batch_size)

    def _changed_settings(self) -> Iterator[str]:
        """Yield what differs from the settings of the run so far, among those that may."""
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
        model, run = self.trainer.model, self.config.run
        checkpoint = Checkpoint(
            run_id=self.directory.run_id,
            state=progress.state,
            stream=None if progress.stream is None else _stream_parts(progress.stream),
            model_config=model.config,
            model_tensors=model.state_dict(),
            optimizer_tensors=(
                optimizer_tensors(self.trainer.optimizer, model)
                if run.save_optimizer_state
                else None
            ),
        )
        save_checkpoint(self.directory.path, name, checkpoint, self._save_tokenizer)
        for warning in prune(
            self.directory.path, run.keep_checkpoints, self.directory.run_id, protected={name}
        ):
            self.trainer.tracker.warn(warning)

    def _save_tokenizer(self, directory: Path) -> None:
        self.text.tokenizer.save_pretrained(directory)


def _resumes_here(config: PretrainingConfig) -> bool:
    """Tell whether the run in the directory is gone on with.

    A checkpoint that lies elsewhere begins a run of its own here, which must not take over another.
    """
    run = config.run
    if run.resume_checkpoint is None:
        return run.resume
    return run.resume_checkpoint.resolve().parent == run.checkpoint_dir.resolve()


def _stream_parts(stream: StreamState) -> StreamParts:
    plain, arrays = stream.to_parts()
    return plain, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _stream_from(parts: StreamParts) -> StreamState:
    plain, tensors = parts
    return StreamState.from_parts(plain, {name: each.numpy() for name, each in tensors.items()})
