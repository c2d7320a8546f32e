"""The training loop.

    for each update u = 0, 1, 2, ...
        for each micro-batch m of the update
            seed dropout with (seed, u, m)
            add to the gradients:  d/dw  loss_sum(batch) / N
        stop here if the loss or the gradient is not a number
        clip the gradients, set the learning rate of u, take a step of AdamW
        now and then: log, evaluate, save

**What the loss is divided by.** N is the number of predicted tokens of the *whole update*, known
before its first backward pass because the batches of an update are fetched together. Take an
update of two micro-batches, one of long documents that predicts 90 tokens with a loss of 5 nats
each, one of short ones that predicts 10 with 2 nats each. Its mean loss is

>>> (90 * 5 + 10 * 2) / (90 + 10)
4.7

where a mean of the micro-batches' means, which most training loops take, says

>>> (5 + 2) / 2
3.5

and would give a token of the short documents nine times the weight of one of the long. Divided by
N, the gradient is that of one large batch, however it was cut. (HF: its Trainer learned to do this
for causal models in 2024; `run_mlm` averages means. Paper and fairseq: as here.)

**What makes a resume exact.** Everything random is a function of u and m (`randomness.py`), and an
evaluation draws nothing. So a run that was interrupted and resumed, or evaluated more often, is the
same run to the last bit, on the same machine with the same number of threads: sums of floating-
point numbers depend on their order, which other kernels and thread counts choose differently.

**Several processes** (`distributed.py`) change two lines: the number of predicted tokens is that
of all ranks, and the last micro-batch of an update adds up everybody's gradients. Whatever may end
the run, a signal or text that breaks off on one rank, is agreed upon between two updates, so that
all ranks stop at the same one.

**When it stops.** A loss or gradient that is no number ends the run *before* the update, because
AdamW would carry a single infinity into every weight, and the next checkpoint would keep it. A
signal is honoured between two updates, after a checkpoint. Text that breaks off (a stream whose
network is gone) also leaves a checkpoint first.

Next: `run.py`, which sets all this up; `optimizer.py`; `checkpoint.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from annotated_mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.config import PretrainingConfig
from annotated_mpnet.data.loader import UpdateSource, prefetch
from annotated_mpnet.data.streams import StreamState
from annotated_mpnet.errors import DataError, DivergedError, FailedElsewhereError
from annotated_mpnet.modeling.pretraining import cross_entropy_sum
from annotated_mpnet.randomness import fold_in_seed
from annotated_mpnet.signals import Stopped, StopRequest, listening
from annotated_mpnet.training.checkpoint import BEST, TrainState, checkpoint_name
from annotated_mpnet.training.compilation import uncompiled
from annotated_mpnet.training.distributed import SharedNetwork, whole
from annotated_mpnet.training.memory import out_of_memory
from annotated_mpnet.training.optimizer import learning_rate, set_learning_rate
from annotated_mpnet.training.throughput import (
    device_name,
    memory_peak,
    peak_flops,
    training_flops,
)
from annotated_mpnet.training.tracking import Stopwatch, Tracker, nats_to_bits

PREFETCHED_UPDATES = 2
"""Updates whose batches are made ahead, while the ones before them are trained on."""


@dataclass(frozen=True)
class UpdateResult:
    """What one update saw and did.

    Attributes:
        loss_sum: cross-entropy in nats, summed over the predicted tokens. A sum, so that a line of
            metrics over many updates can weigh each token alike.
        num_predicted: predicted tokens.
        num_tokens: tokens of the sentences, padding not counted.
        gradient_norm: Euclidean length of the gradient, before it was clipped.
        flops: operations of this rank, forward and backward (`throughput.py`).
    """

    loss_sum: float
    num_predicted: int
    num_tokens: int
    gradient_norm: float
    flops: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands: its state, and that of its stream of text, if it has one."""

    state: TrainState
    stream: StreamState | None = None


@dataclass(frozen=True)
class Evaluation:
    """Loss in bits per predicted token, and the share of them that was predicted right."""

    bits: float
    accuracy: float


class Trainer:
    """One model in training: updates, evaluations, and the loop that orders them.

    Args:
        network: on its device, shared out among the ranks.
        optimizer: of the model's parameters.
        config: the whole configuration.
        bf16: whether matrix products run in bfloat16.
        tracker: where numbers and messages go.
    """

    def __init__(
        self,
        network: SharedNetwork,
        optimizer: Optimizer,
        config: PretrainingConfig,
        bf16: bool,
        tracker: Tracker,
    ) -> None:
        self.network = network
        self.model = network.model
        self.world = network.world
        self.optimizer = optimizer
        self.config = config
        self.tracker = tracker
        self._parameters = list(self.model.parameters())
        self._device = self._parameters[0].device
        self._bf16 = bf16
        self._autocast = torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16)

    def train(
        self,
        progress: Progress,
        source: UpdateSource,
        validation: Callable[[], Iterable[Batch]] | None,
        save: Callable[[str, Progress], None],
    ) -> TrainState:
        """Train from where a run stands to its last update, and return the state there.

        Args:
            progress: where to begin.
            source: yields the micro-batches of one update after the other.
            validation: makes the validation batches anew for each evaluation; None for none.
            save: writes a checkpoint under a name.

        Raises:
            DivergedError: the loss or the gradient is not a number; before the update is applied.
            DataError: the text ended or broke off; after saving a checkpoint.
            Stopped: a signal asked for it; after saving a checkpoint.
        """
        run, total = self.config.run, self.config.optimization.total_updates
        # `state` is replaced, never changed: what a checkpoint was given stays as it was given.
        state, stream, first = progress.state, progress.stream, progress.state.update
        window = _Window(self.tracker, self._device, self._bf16)
        request = StopRequest()
        # Batches are made in a thread, some updates ahead. A stream's state comes along with the
        # batches that it belongs to, because the stream itself is already further.
        ahead = source.updates(first, self.config.optimization.update_freq, stream)
        with closing(prefetch(ahead, PREFETCHED_UPDATES)) as updates, listening(request):
            while state.update < total:
                window.stopwatch.start()
                micro_batches, following, broken = _fetch(updates)
                if any(self.world.sum(broken is not None)):
                    # What was trained since the last checkpoint is worth keeping.
                    if state.update > first:
                        save(checkpoint_name(state.update), Progress(state, stream))
                    raise broken or FailedElsewhereError("text broke off", DataError.exit_code)
                stream = following
                # The time until here was spent waiting: `perf/data_wait`. It should be nothing.
                window.stopwatch.data_arrived()
                result = self._update_or_explain(state.update, micro_batches)
                window.stopwatch.stop()
                window.add(result)
                state = _advance(state, result)

                # The last update is always logged, evaluated and saved, whatever the intervals.
                last = state.update == total
                if last or state.update % self.config.tracking.logging_steps == 0:
                    rate = learning_rate(state.update - 1, self.config.optimization)
                    window.log(state.update, rate)
                self.tracker.progress(state.update)
                if validation and (last or state.update % run.effective_eval_interval == 0):
                    state = self._validate(Progress(state, stream), validation(), save)
                # After the evaluation, so that the checkpoint knows the best loss so far.
                due = run.checkpoint_interval > 0 and state.update % run.checkpoint_interval == 0
                stop = self._agree_on_stop(request)
                if last or due or stop is not None:
                    save(checkpoint_name(state.update), Progress(state, stream))
                if stop is not None and not last:
                    self.tracker.say(f"saved after update {state.update}; --resume goes on there")
                    raise Stopped(stop)
        return state

    def _update_or_explain(self, number: int, micro_batches: list[Batch]) -> UpdateResult:
        """Make an update; say which flags to try if it does not fit into memory."""
        try:
            return self.update(number, micro_batches)
        except RuntimeError as error:
            explained = out_of_memory(error, self.config, self._device, self.world.size)
            raise (explained or error) from error

    def update(self, number: int, micro_batches: list[Batch]) -> UpdateResult:
        """Take one step of the optimizer, on the gradient of several micro-batches.

        Args:
            number: of the update, from 0; with the seed, it decides learning rate and dropout.
            micro_batches: what the update sees; at least one.

        Raises:
            DivergedError: the loss or the gradient is not a number. Weights and optimizer are as
                they were.
        """
        predicted, tokens = self.world.sum(
            sum(batch.num_predicted for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
        )
        num_predicted, num_tokens = int(predicted), int(tokens)
        if num_predicted == 0:
            # AdamW would move the weights even on a gradient of zero, by its momentum and decay.
            self.tracker.warn(f"update {number + 1} has no token to predict; nothing was changed")
            return UpdateResult(0.0, 0, num_tokens, 0.0, 0.0)

        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        own_loss = torch.zeros((), device=self._device)
        for position, batch in enumerate(micro_batches):
            seed_dropout(self.config.run.seed, number, position, self.world.rank)
            last = position == len(micro_batches) - 1
            # Under autocast matrix products run in bfloat16; weights, gradients, norms and the
            # loss stay in float32. The backward pass takes each product's type from the forward.
            with self.network.adding_up(last), self.world.noticing_loss():
                with self._autocast:
                    micro_loss = self.network.loss_sum(
                        batch.to(self._device), self.config.objective.input_mode
                    )
                # Times the ranks, because the average over them is what comes back.
                share = micro_loss * self.world.size / num_predicted
                share.backward()  # type: ignore[no-untyped-call]
            # Added up on the device: asking for its value would wait for the device to get there.
            own_loss += micro_loss.detach()

        norm = self._clip_gradients()
        (loss_sum,) = self.world.sum(own_loss.item())
        self._refuse_non_finite(number, loss_sum / num_predicted, norm)
        set_learning_rate(self.optimizer, learning_rate(number, self.config.optimization))
        self.optimizer.step()
        flops = sum(self._flops(batch) for batch in micro_batches)
        return UpdateResult(loss_sum, num_predicted, num_tokens, norm, flops)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Measure the loss over batches. Changes nothing: no weight, no random number.

        Args:
            batches: this rank's share; the ranks may have different numbers of them.

        Returns:
            Bits and accuracy over all predicted tokens of all ranks; not a number if there are
            none.
        """
        # Without dropout. `update` switches it on again, so that nothing depends on who ran last.
        self.model.eval()
        loss_sum = correct = num_predicted = 0.0
        for batch in batches:
            moved = batch.to(self._device)
            with self._autocast, uncompiled():
                logits_BPV = self.model(
                    moved.input_ids,
                    moved.predicted_positions,
                    moved.predicted_ids,
                    moved.attention_mask,
                    self.config.objective.input_mode,
                )
            # An empty slot predicts nothing and must not count as wrong (nor, by chance, as right).
            used_BP = moved.predicted_ids != NOT_PREDICTED
            loss_sum += cross_entropy_sum(logits_BPV, moved.predicted_ids).item()
            correct += ((logits_BPV.argmax(-1) == moved.predicted_ids) & used_BP).sum().item()
            num_predicted += batch.num_predicted
        self.network.settle()
        loss_sum, correct, num_predicted = self.world.sum(loss_sum, correct, num_predicted)
        if num_predicted == 0:
            return Evaluation(math.nan, math.nan)
        return Evaluation(nats_to_bits(loss_sum / num_predicted), correct / num_predicted)

    def _clip_gradients(self) -> float:
        """Shorten the gradient to the longest allowed; return the length that it had."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # One length over all parameters: the gradient keeps its direction and only gets shorter.
        # Clipping each parameter by itself would turn it.
        longest = self.config.optimization.clip_grad_norm
        if longest > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, longest, norm)
        return whole(norm).item()

    def _flops(self, batch: Batch) -> float:
        (batch_size, length), slots = batch.input_ids.shape, batch.predicted_ids.shape[1]
        return training_flops(
            self.model.config, self.config.objective.input_mode, batch_size, length, slots
        )

    def _agree_on_stop(self, request: StopRequest) -> int | None:
        """Return the signal that any rank has received, the same on all of them; None if none."""
        received = [int(number) for (number,) in self.world.gather(request.number or 0)]
        return max(received) or None

    def _refuse_non_finite(self, number: int, loss: float, norm: float) -> None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {name} of update {number + 1} is {value}; it was not applied, and the "
                    "checkpoints are from before it: go on from one with a lower --lr (now "
                    f"{self.config.optimization.lr:g}), a longer --warmup-updates, or a smaller "
                    "--clip-grad-norm"
                )

    def _validate(
        self, progress: Progress, batches: Iterable[Batch], save: Callable[[str, Progress], None]
    ) -> TrainState:
        """Evaluate, and keep the model if none was better; return the state with the best loss."""
        state, result = progress.state, self.evaluate(batches)
        metrics = {
            "valid/loss": result.bits * math.log(2),
            "valid/bits": result.bits,
            "valid/accuracy": result.accuracy,
        }
        self.tracker.log(state.update, metrics)
        if state.best_valid_bits is None or result.bits < state.best_valid_bits:
            # The state first: the best checkpoint must itself know that it is the best.
            state = dataclasses.replace(state, best_valid_bits=result.bits)
            save(BEST, Progress(state, progress.stream))
        return state


def seed_dropout(seed: int, update: int, micro_batch: int, rank: int) -> None:
    """Make dropout a function of the position in the run, not of what was drawn before.

    PyTorch's dropout draws from one global generator. It is seeded anew for each micro-batch, so
    that what was drawn elsewhere, or how often, leaves no trace.
    """
    torch.manual_seed(fold_in_seed(seed, "dropout", update, micro_batch, rank) % 2**63)


Fetched = tuple[list[Batch], StreamState | None, DataError | None]


def _fetch(updates: Iterator[tuple[list[Batch], StreamState | None]]) -> Fetched:
    """Return the next update's micro-batches and the state behind them, or what went wrong."""
    try:
        return *next(updates), None
    except DataError as error:
        return [], None, error


def _advance(state: TrainState, result: UpdateResult) -> TrainState:
    return dataclasses.replace(
        state,
        update=state.update + 1,
        tokens_seen=state.tokens_seen + result.num_tokens,
        predicted_seen=state.predicted_seen + result.num_predicted,
    )


class _Window:
    """Sums since the last line of metrics."""

    def __init__(self, tracker: Tracker, device: torch.device, bf16: bool) -> None:
        self._tracker = tracker
        self._device = device
        self._peak_flops = peak_flops(device_name(device), bf16)
        self.stopwatch = Stopwatch()
        self._results: list[UpdateResult] = []

    def add(self, result: UpdateResult) -> None:
        self._results.append(result)

    def log(self, step: int, rate: float) -> None:
        predicted = sum(result.num_predicted for result in self._results)
        tokens = sum(result.num_tokens for result in self._results)
        loss = sum(result.loss_sum for result in self._results) / max(predicted, 1)
        seconds = max(self.stopwatch.training, 1e-9)
        metrics = {
            "train/loss": loss,
            "train/bits": nats_to_bits(loss),
            "train/learning_rate": rate,
            "train/gradient_norm": self._results[-1].gradient_norm,
            "perf/tokens_per_second": tokens / seconds,
            "perf/predicted_per_second": predicted / seconds,
            "perf/data_wait": self.stopwatch.waiting / seconds,
            "memory/peak_gb": memory_peak(self._device),
        }
        if self._peak_flops is not None:
            flops = sum(result.flops for result in self._results)
            metrics["perf/mfu"] = flops / seconds / self._peak_flops
        self._tracker.log(step, metrics)
        self._results.clear()
        self.stopwatch = Stopwatch()
