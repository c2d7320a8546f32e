"""What a run does around the updates of `mpnet/loop.py`: log, evaluate, save, stop.

All ranks run the same loop and call these methods in the same order.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from annotated_mpnet.checkpoints.checkpoint import (
    BEST,
    IdentityValue,
    TrainState,
    checkpoint_name,
)
from annotated_mpnet.checkpoints.saving import Saver
from annotated_mpnet.errors import DataError, FailedElsewhereError
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.loop import Evaluation, Hooks, Progress, UpdateResult
from annotated_mpnet.mpnet.optimizer import learning_rate
from annotated_mpnet.settings.config import RunConfig
from annotated_mpnet.signals import StopRequest
from annotated_mpnet.tracking.guesses import Guess
from annotated_mpnet.tracking.tracker import Tracker
from annotated_mpnet.training.loader import Update
from annotated_mpnet.training.metrics import MetricsWindow
from annotated_mpnet.training.trainer import Trainer


@dataclass
class RunHooks(Hooks):
    """The hooks of one call of the loop.

    Attributes:
        start: where the loop begins.
        identity: of the run, for its checkpoints.
        validation: makes the batches of an evaluation; None without validation text.
        guess: has the model guess the masked words of the validation text (`masked_words.py`).
        run: the intervals, in updates, of evaluations and checkpoints.
        logging_steps: that of lines of metrics.
        export_files: what a checkpoint keeps for its export, given the evaluation of this update.
        request: notes the first signal; it is looked at between two updates, and between two
            batches of an evaluation.
        stopped_by: the signal that stopped the loop, the same on all ranks; None if none did.
    """

    trainer: Trainer
    tracker: Tracker
    saver: Saver
    start: Progress
    identity: dict[str, IdentityValue]
    validation: Callable[[], Iterable[Batch]] | None
    guess: Callable[[], list[Guess]]
    run: RunConfig
    logging_steps: int
    export_files: Callable[[Evaluation | None], Mapping[str, bytes]]
    request: StopRequest = field(default_factory=StopRequest)
    stopped_by: int | None = None

    def __post_init__(self) -> None:
        self.log_every = self.logging_steps
        self.evaluate_every = self.run.effective_eval_interval
        self.save_every = self.run.checkpoint_interval
        self._progress = self.start
        self._evaluated: tuple[int, Evaluation] | None = None
        self._window = MetricsWindow(self.trainer)

    def updates(self, ahead: Iterator[Update]) -> Iterator[Update]:
        """Yield what was made ahead, as long as disk and text allow.

        Raises:
            DataError: the text of this rank broke off; after a checkpoint.
            FailedElsewhereError: that of another rank did.
            WriteError: an earlier checkpoint could not be written.
        """
        while True:
            self.saver.check()
            self._window.wait_for_batches()
            update, broken = _next(ahead)
            # If one rank raised alone, the others would wait for it in the next exchange.
            if any(self.trainer.world.sum(broken is not None)):
                if self._progress.update > self.start.update:
                    self.save(self._progress, best=False)
                    self.saver.finish()
                raise broken or FailedElsewhereError("text broke off", DataError.exit_code)
            self._window.batches_arrived()
            assert update is not None
            yield update

    def updated(self, progress: Progress, micro_batches: list[Batch], result: UpdateResult) -> None:
        """Count an update, and show it."""
        self._progress = progress
        self._window.add(micro_batches, result)
        if result.num_predicted == 0:
            self.tracker.warn(
                f"update {progress.update} has no token to predict; nothing was changed"
            )
        self.tracker.progress(progress.update)

    def log(self, progress: Progress) -> None:
        """Send a line of metrics to the tracker."""
        self._pause()
        rate = learning_rate(progress.update - 1, self.trainer.optimization)
        self.tracker.log(progress.update, self._window.take(rate))

    def evaluate(self, progress: Progress) -> float | None:
        """Measure the loss on the validation text, if there is one, and log it.

        A signal abandons it after the batch that it finds: None.
        """
        if self.validation is None:
            return math.nan
        self._pause()
        result = self.trainer.evaluate(self._until_stopped(self.validation()))
        if self.stopped_by is not None:
            return None
        metrics = {
            "valid/loss": result.bits * math.log(2),
            "valid/bits": result.bits,
            "valid/accuracy": result.accuracy,
        }
        self.tracker.log(progress.update, metrics)
        self.tracker.guessed(progress.update, self.guess())
        self._evaluated = progress.update, result
        return result.bits

    def save(self, progress: Progress, best: bool) -> None:
        """Hand a checkpoint to the saver, which writes it beside the next updates."""
        self._pause()
        name = BEST if best else checkpoint_name(progress.update)
        update, evaluation = self._evaluated or (None, None)
        files = self.export_files(evaluation if update == progress.update else None)
        self.saver.save(name, state_of(progress, self.identity), progress.text, files)

    def should_stop(self) -> bool:
        """Return whether any rank has received a signal."""
        # If there are two, SIGTERM (15) goes before SIGINT (2), for one exit code on all ranks.
        received = self.trainer.world.gather(self.request.number or 0)
        self.stopped_by = int(max(received)[0]) or None
        return self.stopped_by is not None

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.should_stop():
                return
            yield batch

    def _pause(self) -> None:
        """Check the updates so far, and end the time of training: what follows is not training."""
        self.trainer.catch_up()
        self._window.pause()


def state_of(progress: Progress, identity: dict[str, IdentityValue]) -> TrainState:
    """Return what a checkpoint keeps of a run's progress."""
    best = progress.best_valid_bits
    return TrainState(
        update=progress.update,
        tokens_seen=progress.tokens_seen,
        predicted_seen=progress.predicted_seen,
        best_valid_bits=None if best == math.inf else best,
        identity=identity,
        evaluation_due=progress.evaluation_due,
    )


def _next(ahead: Iterator[Update]) -> tuple[Update | None, DataError | None]:
    """Return the next update, or what is wrong with its text."""
    try:
        return next(ahead), None
    except DataError as error:
        return None, error
