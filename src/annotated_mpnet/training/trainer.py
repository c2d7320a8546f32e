"""The training loop.

    for each update u = 0, 1, 2, ...
        for each micro-batch m of the update
            seed dropout with (seed, u, m)
            add to the gradients:  d/dw  loss_sum(batch) / N
        stop here if the loss or the gradient is not a number
        clip the gradients, set the learning rate of u, take a step of AdamW
        now and then: log, evaluate, save

That is all. Everything before it prepares a line of this, everything behind it looks after what a
line leaves. `Trainer.update` is the inner part, `Trainer.train` the outer one.

**How large is an update?** Paper, section 3.1: 8192 rows of 512 tokens, of which 15 % are
predicted. No device holds that, so an update is cut into micro-batches, whose gradients are added
up before a single step is made. A GPU that holds 32 rows needs 256 of them, eight such GPUs need 32
each, and what the step sees is the same: N, in both cases, is about

>>> import numpy as np
>>> from annotated_mpnet.data.masking import count_predicted
>>> 8192 * int(count_predicted(np.array(512 - 2), pred_prob=0.15))  # <s> and </s> are not predicted
622592

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
N, the gradient without dropout is that of one large batch, however it was cut. Dropout draws new
masks for each micro-batch (`seed_dropout`), so with it another cut gives other masks.

fairseq: also divides once, by the sum of B x P over the update. That counts predicted padding, the
loss of which it leaves out. HF: since 2024 the Trainer counts the tokens of all micro-batches,
gives the count to any model that takes keyword arguments, and trusts it to divide.
`MPNetForMaskedLM` takes them and does not look (transformers 5.23): the gradient is the *sum* of
the means, k times as long with k micro-batches, and so is the loss that is logged. AdamW divides
the length of a gradient out again, so that the run gets along; clipping, below, then comes k times
as early.

**What a loss should be at the beginning.** Fresh weights of N(0, 0.02) say nothing about any token,
so that each is as likely as the next, and the first line of metrics should show about

>>> import math
>>> round(math.log(30_527), 1), round(math.log2(30_527), 1)  # nats, bits, of MPNet's vocabulary
(10.3, 14.9)

More, and the weights fit together badly: a fresh head on somebody's trained encoder began at 19
bits (`docs/log.md`). Less, and something is known already: frequencies, with `--head-bias
frequencies`, or all that a former training has learned. Then the loss falls to the unigram plateau
(`data/statistics.py`), where the network knows how often words occur and nothing of the context. It
leaves the plateau within some hundred updates (`modeling/local_start.py`), and the run says so
(`plateau.py`). If the loss ever falls towards 0, a query sees the token that it predicts.

**Clipping.** Now and then an update has a gradient many times as long as usual. All of it is made
shorter by one factor, so that it keeps its direction. For two weights, with a longest of 1:

>>> weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
>>> for weight, gradient in zip(weights, (30.0, 40.0)):
...     weight.grad = torch.tensor([gradient])
>>> nn.utils.clip_grad_norm_(weights, 1.0).item()
50.0
>>> [round(weight.grad.item(), 4) for weight in weights]
[0.6, 0.8]

Cut one by one they would be 1 and 1: another direction, in which nobody has asked to go. AdamW
does not mind how long gradients are if all are equally long; it is the single long one that would
stay in its means for the next 50 updates.

**When it stops.** A loss or gradient that is no number ends the run *before* the update, because
one such number is enough to lose all weights. It makes the length of the gradient no number
either, and by that everything is divided:

>>> weights[0].grad = torch.tensor([math.nan])
>>> _ = nn.utils.clip_grad_norm_(weights, 1.0)
>>> [weight.grad.item() for weight in weights]
[nan, nan]

AdamW would carry that into each weight, and the next checkpoint would keep it. (HF: the Trainer
takes the step, and by default writes, in place of a loss that is no number, the mean of those
before into its log: `logging_nan_inf_filter`.)

**A GPU is not asked in between.** To decide by an `if`, the CPU must know a number, and so wait
until the GPU has computed it; then the GPU waits until the CPU has said what is next:

    asked each time     CPU  u1 ....wait.... u2 ....wait.... u3 ....wait
                        GPU     u1 u1 u1        u2 u2 u2        u3 u3 u3
    not asked           CPU  u1 u2 u3  ...and so on, until a line is logged
                        GPU     u1 u1 u1 u2 u2 u2 u3 u3 u3

So there the decision is the GPU's. A number in its memory becomes 1 with the first update whose
loss or gradient is not a number, and stays 1; the optimizer's kernel looks at it and, where it is
1, leaves all as it is. The CPU looks when it has to wait anyway, before it logs, evaluates or saves
(`catch_up`), and ends the run with the same words about the same update. What is said later is said
about weights that have not changed since: of the updates behind the first bad one, none was
applied.

>>> weight = nn.Parameter(torch.ones(1))
>>> optimizer = torch.optim.AdamW([weight], fused=True)
>>> optimizer.found_inf = halted = torch.tensor(0.0)
>>> for gradient in (1.0, math.nan, 1.0):
...     weight.grad = torch.tensor([gradient])
...     _ = torch.maximum(halted, (~weight.grad.isfinite()).float().squeeze(), out=halted)
...     optimizer.step()
...     print(round(weight.item(), 3), optimizer.state[weight]["step"].item())
0.999 1.0
0.999 1.0
0.999 1.0

A CPU has its numbers at once and is asked each time, so that an error comes when it happens. So is
a GPU with --fsdp, where PyTorch promises nothing about the flag.

**A signal** is honoured between two updates, after a checkpoint. Text that breaks off (a stream
whose network is gone) also leaves a checkpoint first.

**What makes a resume exact.** Everything random is a function of u and m (`randomness.py`), and an
evaluation draws nothing. So a run that was interrupted and resumed, or evaluated more often, is the
same run to the last bit, on the same machine with the same number of threads: sums of floating-
point numbers depend on their order, which other kernels and thread counts choose differently.

>>> (0.1 + 0.2) + 0.3 == 0.1 + (0.2 + 0.3)
False

**Batches come from ahead.** A thread makes those of the next updates while this one is computed,
for a GPU in memory that it can fetch them from by itself (`data/loader.py`).
Text on the disk does not mind, because its batch k is a function of k. A stream does: it is further
than what has been trained on. So each update brings along the state of the stream *behind it*,
and that is what a checkpoint keeps. In a picture, with two updates made ahead:

    the loop has done           0  1  2
    the thread has made         0  1  2  3  4
    the stream stands behind                4     a resume from here would leave out 3 and 4
    the checkpoint has behind         2

**Several processes** (`distributed.py`) change two lines: the number of predicted tokens is that
of all ranks, and the last micro-batch of an update adds up everybody's gradients. Whatever may end
the run, a signal or text that breaks off on one rank, is agreed upon between two updates, so that
all ranks stop at the same one.

Next: `run.py`, which sets all this up; `optimizer.py`; `checkpoint.py`.

    B batch   P predicted tokens   V vocabulary
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from annotated_mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.config import PretrainingConfig
from annotated_mpnet.data.loader import UpdateSource, pinned, prefetch
from annotated_mpnet.data.streams import StreamState
from annotated_mpnet.errors import DataError, DivergedError, FailedElsewhereError
from annotated_mpnet.modeling.pretraining import cross_entropy_sum
from annotated_mpnet.randomness import fold_in_seed
from annotated_mpnet.signals import Stopped, StopRequest, listening
from annotated_mpnet.training.checkpoint import BEST, TrainState, checkpoint_name
from annotated_mpnet.training.compilation import uncompiled
from annotated_mpnet.training.distributed import SharedNetwork, whole
from annotated_mpnet.training.optimizer import learning_rate, set_learning_rate
from annotated_mpnet.training.throughput import device_name, memory_peak, peak_flops, training_flops
from annotated_mpnet.training.tracking import Stopwatch, Tracker, nats_to_bits

PREFETCHED_UPDATES = 2
"""Updates whose batches are made ahead, while the ones before them are trained on. One would do if
all took the same time; the second makes up for a batch that takes longer, a file that must be
opened. More would only hold memory: with the paper's 8192 rows of 512 tokens, ids and positions of
an update are 44 MB."""


@dataclass(frozen=True)
class UpdateResult:
    """What one update saw and did.

    Attributes:
        loss_sum: cross-entropy in nats, summed over the predicted tokens. A sum, so that a line of
            metrics over many updates can weigh each token alike. A scalar on the device, whose
            value may not be computed yet: to look at it is to wait for it.
        num_predicted: predicted tokens.
        num_tokens: tokens of the sentences, padding not counted.
        gradient_norm: Euclidean length of the gradient, before it was clipped; like the loss, a
            scalar on the device.
        flops: operations of this rank, forward and backward (`throughput.py`).
    """

    loss_sum: Tensor
    num_predicted: int
    num_tokens: int
    gradient_norm: Tensor
    flops: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands: its state, and that of its stream of text, if it has one.

    The two belong together: both are from behind the same update. A checkpoint is made of them, and
    of the tensors (`session.py`).
    """

    state: TrainState
    stream: StreamState | None = None


class Saving(Protocol):
    """Where checkpoints go: `saving.py`, which writes them while the loop goes on."""

    def save(self, name: str, progress: Progress) -> None:
        """Take what a checkpoint is made of, to be written under a name.

        When this returns, weights may change again; on the disk it is behind `finish`.
        """
        ...

    def check(self) -> None:
        """Raise what a save has failed with, if one has; does not wait."""
        ...

    def finish(self) -> None:
        """Return when everything is on the disk; raise what a save has failed with."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What a network is worth on text that it is not trained on.

    Attributes:
        bits: loss per predicted token, as a mean over tokens.
        accuracy: the share of them to which the network gives more than to any other token. It is
            easier to imagine than bits, and coarser: a token that climbs from place 1000 to place 2
            changes nothing about it.
    """

    bits: float
    accuracy: float


class Trainer:
    """One model in training: updates, evaluations, and the loop that orders them.

    A whole run in miniature. The network has a layer and a vocabulary of 20; the text is three
    rows, of which the first predicts two tokens (first "9", then "7") and the others one, so that
    they have an empty slot:

    >>> from annotated_mpnet.config import ModelConfig, OptimizationConfig, RunConfig
    >>> from annotated_mpnet.modeling import MPNetForPretraining
    >>> from annotated_mpnet.training.distributed import World
    >>> from annotated_mpnet.training.optimizer import build_optimizer
    >>> ids_BL = torch.tensor([[0, 4, 8, 4, 2], [0, 4, 8, 6, 2], [0, 5, 4, 9, 2]])
    >>> positions_BP = torch.tensor([[3, 1], [1, 1], [2, 2]])
    >>> predicted_BP = torch.tensor([[9, 7], [5, NOT_PREDICTED], [8, NOT_PREDICTED]])
    >>> def rows(first, end):
    ...     tensors = (each[first:end] for each in (ids_BL, positions_BP, predicted_BP))
    ...     num_predicted = (predicted_BP[first:end] != NOT_PREDICTED).sum().item()
    ...     return Batch(*tensors, None, 5 * (end - first), num_predicted)
    >>> def new_trainer():
    ...     torch.manual_seed(0)
    ...     small = {"encoder_layers": 1, "encoder_embed_dim": 8, "encoder_ffn_dim": 8}
    ...     small |= {"encoder_attention_heads": 2, "vocab_size": 20, "max_positions": 8}
    ...     still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    ...     cpu, network = torch.device("cpu"), MPNetForPretraining(ModelConfig(**small, **still))
    ...     config = PretrainingConfig(
    ...         optimization=OptimizationConfig(total_updates=5, update_freq=2, lr=0.03,
    ...                                         warmup_updates=0),
    ...         run=RunConfig(checkpoint_interval=2, eval_interval_steps=3))
    ...     optimizer = build_optimizer(network, config.optimization, cpu)
    ...     shared = SharedNetwork(network, World(), cpu)
    ...     return Trainer(shared, optimizer, config, False, Tracker.silent())

    *Without dropout, an update is the same however it is cut.* All three rows at once, or the one
    and the others:

    >>> at_once = new_trainer().update(0, [rows(0, 3)])
    >>> cut = new_trainer().update(0, [rows(0, 1), rows(1, 3)])
    >>> at_once.num_predicted, cut.num_predicted
    (4, 4)
    >>> math.isclose(at_once.loss_sum, cut.loss_sum, rel_tol=1e-5)
    True
    >>> math.isclose(at_once.gradient_norm, cut.gradient_norm, rel_tol=1e-5)
    True

    *A fresh network knows nothing*, and so needs log2 of the vocabulary:

    >>> trainer = new_trainer()
    >>> abs(trainer.evaluate([rows(0, 3)]).bits - math.log2(20)) < 0.2
    True

    *An evaluation leaves no trace*, not even in the generator that dropout draws from:

    >>> before = torch.get_rng_state()
    >>> trainer.evaluate([rows(0, 3)]) == trainer.evaluate([rows(0, 3)])
    True
    >>> torch.equal(torch.get_rng_state(), before)
    True

    *What is saved, and when?* Five updates, a checkpoint every 2, an evaluation every 3:

    >>> class TheSameAgain:
    ...     def updates(self, first_update, micro_batches, state=None):
    ...         while True:
    ...             yield [rows(0, 1), rows(1, 3)], None
    >>> class Told:
    ...     def save(self, name, progress):
    ...         known = "" if progress.state.best_valid_bits is None else ", knows the best loss"
    ...         print(f"{name} after {progress.state.update}{known}")
    ...     def check(self):
    ...         pass
    ...     def finish(self):
    ...         print("all of it on the disk")
    >>> start = TrainState(
    ...     update=0, tokens_seen=0, predicted_seen=0, best_valid_bits=None, identity={})
    >>> end = trainer.train(Progress(start), TheSameAgain(), lambda: [rows(0, 3)], Told())
    checkpoint2 after 2
    best_checkpoint after 3, knows the best loss
    checkpoint4 after 4, knows the best loss
    best_checkpoint after 5, knows the best loss
    checkpoint5 after 5, knows the best loss
    all of it on the disk
    >>> end.update, end.tokens_seen, end.predicted_seen
    (5, 75, 20)

    The last update is evaluated and saved in any case.

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
        # Updates whose loss and gradient nobody has looked at yet, by their numbers.
        self._unread: list[tuple[int, UpdateResult]] = []
        # The sentinel on the device: 1 as soon as one of them was not a number. None: no sentinel.
        self._halted: Tensor | None = None
        if self._device.type == "cuda" and not network.is_sharded:
            self.look_later()

    def look_later(self) -> None:
        """Leave it to the device to refuse updates, and look at them in `catch_up`: for a GPU.

        On a CPU, where tensors are there at once, it gives the same, later.
        """
        # The name and its meaning are PyTorch's, made for float16, in which gradients overflow now
        # and then: where the fused AdamW finds 1 there, weights, means and step counts stay.
        self._halted = torch.zeros((), device=self._device)
        self.optimizer.found_inf = self._halted  # type: ignore[attr-defined]

    def catch_up(self) -> None:
        """Wait for the device, and look at the updates that were made since the last time.

        Raises:
            DivergedError: the loss or the gradient of one was not a number. It was not applied, and
                none behind it.
        """
        unread, self._unread = self._unread, []
        losses, norms = _values([result for _, result in unread])
        for (number, result), loss, norm in zip(unread, losses, norms, strict=True):
            self._refuse_non_finite(number, loss / result.num_predicted, norm)

    def train(
        self,
        progress: Progress,
        source: UpdateSource,
        validation: Callable[[], Iterable[Batch]] | None,
        saving: Saving,
    ) -> TrainState:
        """Train from where a run stands to its last update, and return the state there.

        What is done behind an update, in an order that is not free:

            log       first, since the other two take time that is no training
            evaluate  may find a new best loss, which is part of the state
            save      keeps that state; without the best loss in it, the first evaluation after a
                      resume would pass for the best one
            stop      is last, with nothing left half done: it waits for the disk

        Args:
            progress: where to begin.
            source: yields the micro-batches of one update after the other.
            validation: makes the validation batches anew for each evaluation; None for none.
            saving: takes checkpoints, and writes them beside the loop.

        Raises:
            DivergedError: the loss or the gradient is not a number; before the update is applied.
            DataError: the text ended or broke off; after saving a checkpoint.
            Stopped: a signal asked for it; after saving a checkpoint.
            WriteError: a checkpoint could not be written, perhaps one of some updates ago.
        """
        run, total = self.config.run, self.config.optimization.total_updates
        # `state` is replaced, never changed: what a checkpoint was given stays as it was given.
        state, stream, first = progress.state, progress.stream, progress.state.update
        window = _Window(self.tracker, self._device, self._bf16)
        request = StopRequest()
        # `closing`, because an error must not leave behind a thread that goes on to read text for
        # nobody. Signals are only noted from here on.
        ahead = source.updates(first, self.config.optimization.update_freq, stream)
        if self._device.type == "cuda":
            ahead = pinned(ahead, self._device)
        with closing(prefetch(ahead, PREFETCHED_UPDATES)) as updates, listening(request):
            while state.update < total:
                saving.check()
                window.stopwatch.start()
                # Text may break off on one rank alone. Were the error raised there and then, the
                # others would wait in the next exchange; so it is a value, and all hear of it.
                micro_batches, following, broken = _fetch(updates)
                if any(self.world.sum(broken is not None)):
                    # What was trained since the last checkpoint is worth keeping. If it was
                    # nothing, where the run began is saved already, or there is no run yet.
                    if state.update > first:
                        self._save(saving, checkpoint_name(state.update), Progress(state, stream))
                        saving.finish()
                    raise broken or FailedElsewhereError("text broke off", DataError.exit_code)
                stream = following
                # The time until here was spent waiting: `perf/data_wait`. It should be nothing; if
                # it is not, the device is faster than the thread that makes batches.
                window.stopwatch.data_arrived()
                result = self.update(state.update, micro_batches)
                window.add(result)
                state = _advance(state, result)

                # The last update is always logged, evaluated and saved, whatever the intervals.
                # `state.update` counts the updates done: the one just made is number `- 1`.
                last = state.update == total
                logs = last or state.update % self.config.tracking.logging_steps == 0
                evaluates = last or state.update % run.effective_eval_interval == 0
                due = run.checkpoint_interval > 0 and state.update % run.checkpoint_interval == 0
                if logs or evaluates or due:
                    # What the GPU still has to do is training, and belongs to its time.
                    self.catch_up()
                window.stopwatch.stop()
                if logs:
                    rate = learning_rate(state.update - 1, self.config.optimization)
                    window.log(state.update, rate)
                self.tracker.progress(state.update)
                if validation and evaluates:
                    state = self._validate(Progress(state, stream), validation(), saving)
                # Asked once, of all ranks, before anything depends on the answer; a signal that
                # comes a moment later is found behind the next update.
                stop = self._agree_on_stop(request)
                if last or due or stop is not None:
                    self._save(saving, checkpoint_name(state.update), Progress(state, stream))
                if stop is not None and not last:
                    # Said when it is true. More signals while this waits are noted, and no more.
                    saving.finish()
                    self.tracker.say(f"saved after update {state.update}; --resume goes on there")
                    raise Stopped(stop)
            saving.finish()
        return state

    def update(self, number: int, micro_batches: list[Batch]) -> UpdateResult:
        """Take one step of the optimizer, on the gradient of several micro-batches.

        The box at the top of this file, line by line. A micro-batch is gone, activations and all,
        before the next one begins: only its gradient stays, added to the others in place. So memory
        is that of one micro-batch, however many there are.

        Args:
            number: of the update, from 0; with the seed, it decides learning rate and dropout.
            micro_batches: what the update sees; at least one.

        Returns:
            What all ranks did together, the same on all of them, but for `flops`.

        Raises:
            DivergedError: the loss or the gradient is not a number. Weights and optimizer are as
                they were. (Where the device is not waited for, they are, too, and `catch_up` says
                so.)
        """
        # Both counts are plain numbers, which the CPU knows without asking the device (`batch.py`).
        predicted, tokens = self.world.sum(
            sum(batch.num_predicted for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
        )
        num_predicted, num_tokens = int(predicted), int(tokens)
        if num_predicted == 0:
            # Nothing can be divided by 0. And without a gradient there must be no step: AdamW would
            # move the weights even on one of zero, by its momentum and decay. It is the number of
            # all ranks that is 0, so all of them leave here; one that has nothing to predict while
            # others have goes on, with a loss of 0, for they wait for its gradients.
            self.tracker.warn(f"update {number + 1} has no token to predict; nothing was changed")
            nothing = torch.zeros((), device=self._device)
            return UpdateResult(nothing, 0, num_tokens, nothing, 0.0)

        self.model.train()
        # To None, not to 0: the first micro-batch then writes its gradient, where it would have to
        # read zeros and add to them, and what gets no gradient at all takes no step.
        self.optimizer.zero_grad(set_to_none=True)
        own_loss = torch.zeros((), device=self._device)
        for position, batch in enumerate(micro_batches):
            seed_dropout(self.config.run.seed, number, position, self.world.rank)
            last = position == len(micro_batches) - 1
            # Under autocast matrix products run in bfloat16; weights, gradients, norms and the
            # loss stay in float32. The backward pass takes each product's type from the forward,
            # and so stands outside of it. But inside of `adding_up`: DDP decides in the forward
            # pass whether the gradients of the backward pass will travel.
            with self.network.adding_up(last), self.world.noticing_loss():
                with self._autocast:
                    micro_loss = self.network.loss_sum(
                        batch.to(self._device), self.config.objective.input_mode
                    )
                # Divided before the backward pass, which is linear: a number is divided here, and
                # a hundred million gradients need not be. Times the ranks, because the average over
                # them is what comes back (an example in `distributed.py`).
                share = micro_loss * self.world.size / num_predicted
                share.backward()  # type: ignore[no-untyped-call]
            # Added up on the device: asking for its value would wait for the device to get there.
            own_loss += micro_loss.detach()

        # Loss and length are those of all ranks: either all refuse the update, or none does. It is
        # refused here, between the gradient and the step; a line later would be too late.
        norm, loss_sum = self._clip_gradients(), self.world.sum_on_device(own_loss)
        flops = sum(self._flops(batch) for batch in micro_batches)
        result = UpdateResult(loss_sum, num_predicted, num_tokens, norm, flops)
        self._unread.append((number, result))
        if self._halted is None:
            self.catch_up()
        else:
            # In place, since the optimizer holds on to this tensor; and never from 1 back to 0.
            no_number = ~(norm.isfinite() & loss_sum.isfinite())
            torch.maximum(self._halted, no_number.float(), out=self._halted)
        # A function of the number: no scheduler that a resume could put back one step off.
        set_learning_rate(self.optimizer, learning_rate(number, self.config.optimization))
        self.optimizer.step()
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Measure the loss over batches. Changes nothing: no weight, no random number.

        Each sentence is masked in the same way each time (`data/loader.py`), so that two
        evaluations differ by what was learned between them, and by nothing else. Their batches are
        as large as those of training: without a backward pass no layer's numbers are kept, and what
        takes most is the logits, for 32 rows of MPNet-base

        >>> 4 * 32 * 76 * 30_527 / 1e6                      # MB, of B x P x V numbers
        296.966656

        Args:
            batches: this rank's share. With --fsdp the ranks must have as many, because a layer's
                weights are put together by all of them; `evaluation_batches` sees to it.

        Returns:
            Bits and accuracy over all predicted tokens of all ranks; not a number if there are
            none.
        """
        # Without dropout. `update` switches it on again, so that nothing depends on who ran last.
        # And past DDP, to the model itself: there are no gradients that it could add up.
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
            # Sums of Python's own floats, which have 53 bits: a validation text of a million tokens
            # would reach the end of float32's 24.
            loss_sum += cross_entropy_sum(logits_BPV, moved.predicted_ids).item()
            correct += ((logits_BPV.argmax(-1) == moved.predicted_ids) & used_BP).sum().item()
            num_predicted += batch.num_predicted
        self.network.settle()
        loss_sum, correct, num_predicted = self.world.sum(loss_sum, correct, num_predicted)
        if num_predicted == 0:
            return Evaluation(math.nan, math.nan)
        return Evaluation(nats_to_bits(loss_sum / num_predicted), correct / num_predicted)

    def _clip_gradients(self) -> Tensor:
        """Shorten the gradient to the longest allowed; return the length that it had.

        The former length is what to look at: that of a shortened gradient says what the limit is.
        It is measured without a limit too (--clip-grad-norm 0), and is then only shown.

        With --fsdp each rank has its shares of the gradient. The length of the whole is the root
        of a sum of squares over all of them; to ask for it (`whole`) adds them up.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # One length over all parameters: the gradient keeps its direction and only gets shorter.
        # Clipping each parameter by itself would turn it. The factor is longest / (norm + 1e-6),
        # but at most 1: a short gradient is not made longer.
        longest = self.config.optimization.clip_grad_norm
        if longest > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, longest, norm)
        return whole(norm)

    def _flops(self, batch: Batch) -> float:
        # Of shapes, not of counts: padding and empty slots are computed too (`throughput.py`).
        (batch_size, length), slots = batch.input_ids.shape, batch.predicted_ids.shape[1]
        return training_flops(
            self.model.config, self.config.objective.input_mode, batch_size, length, slots
        )

    def _agree_on_stop(self, request: StopRequest) -> int | None:
        """Return the signal that any rank has received, the same on all of them; None if none.

        Signals are numbers from 1, and 0 stands for none here. If there are two, SIGTERM (15) goes
        before SIGINT (2): ranks that ended with different codes would look like a crash.
        """
        received = [int(number) for (number,) in self.world.gather(request.number or 0)]
        return max(received) or None

    def _refuse_non_finite(self, number: int, loss: float, norm: float) -> None:
        # Both, since a backward pass can overflow behind a loss like any other. The loss first:
        # where it is no number, nothing behind it can be one.
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {name} of update {number + 1} is {value}; it was not applied, and the "
                    "checkpoints are from before it: go on from one with a lower --lr (now "
                    f"{self.config.optimization.lr:g}), a longer --warmup-updates, or a smaller "
                    "--clip-grad-norm"
                )

    def _save(self, saving: Saving, name: str, progress: Progress) -> None:
        """Have a checkpoint written; of updates that have been looked at."""
        self.catch_up()
        saving.save(name, progress)

    def _validate(self, progress: Progress, batches: Iterable[Batch], saving: Saving) -> TrainState:
        """Evaluate, and keep the model if none was better; return the state with the best loss."""
        state, result = progress.state, self.evaluate(batches)
        metrics = {
            "valid/loss": result.bits * math.log(2),
            "valid/bits": result.bits,
            "valid/accuracy": result.accuracy,
        }
        self.tracker.log(state.update, metrics)
        # Any number is better than none. But what is not a number must never become the best: no
        # comparison with it is true, so that nothing after it could be better.
        best = math.inf if state.best_valid_bits is None else state.best_valid_bits
        if result.bits < best:
            # The state first: the best checkpoint must itself know that it is the best.
            state = dataclasses.replace(state, best_valid_bits=result.bits)
            self._save(saving, BEST, Progress(state, progress.stream))
        return state


def seed_dropout(seed: int, update: int, micro_batch: int, rank: int) -> None:
    """Make dropout a function of the position in the run, not of what was drawn before.

    PyTorch's dropout draws from one global generator. It is seeded anew for each micro-batch, so
    that what was drawn elsewhere, or how often, leaves no trace:

    >>> def dropped(*position):
    ...     seed_dropout(12345, *position)
    ...     return nn.functional.dropout(torch.ones(100)).count_nonzero(), torch.rand(1)
    >>> first = dropped(7, 0, 0)
    >>> _ = torch.rand(1000)                                # somebody else draws
    >>> dropped(7, 0, 0) == first
    True
    >>> dropped(7, 0, 1) == first                           # the same micro-batch, on rank 1
    False

    Without the rank, all ranks would drop at the same places of their different sentences, and an
    update would see one pattern where it could have seen eight.

    Args:
        seed: the run's.
        update: from 0.
        micro_batch: within the update, from 0.
        rank: this process.
    """
    # The hash has 128 bits, and `manual_seed` takes 63 of them without a sign.
    torch.manual_seed(fold_in_seed(seed, "dropout", update, micro_batch, rank) % 2**63)


Fetched = tuple[list[Batch], StreamState | None, DataError | None]
"""An update's micro-batches, the stream's state behind them, and what went wrong, if it did."""


def _fetch(updates: Iterator[tuple[list[Batch], StreamState | None]]) -> Fetched:
    """Return the next update's micro-batches and the state behind them, or what went wrong.

    Only what a user can mend becomes a value. A bug is raised where it is met, and the other ranks
    learn of it by the end of the connection.
    """
    try:
        return *next(updates), None
    except DataError as error:
        return [], None, error


def _advance(state: TrainState, result: UpdateResult) -> TrainState:
    """Return the state behind an update; the one before it stays what it is.

    An update without a predicted token counts too. Its number has chosen its batches, and the next
    one must choose others.
    """
    return dataclasses.replace(
        state,
        update=state.update + 1,
        tokens_seen=state.tokens_seen + result.num_tokens,
        predicted_seen=state.predicted_seen + result.num_predicted,
    )


def _values(results: list[UpdateResult]) -> tuple[list[float], list[float]]:
    """Return losses and lengths of gradients as numbers; waits for the device, once for all."""
    if not results:
        return [], []
    both = [*(each.loss_sum for each in results), *(each.gradient_norm for each in results)]
    values: list[float] = torch.stack(both).tolist()
    return values[: len(results)], values[len(results) :]


class _Window:
    """What happened since the last line of metrics.

    Sums are kept and divided once, for the reason that the loss is: a line over the two updates
    of the chapter, one of 90 tokens at 5 nats and one of 10 at 2, says 4.7, and not 3.5.

    >>> window = _Window(Tracker.silent(), torch.device("cpu"), bf16=False)
    >>> losses, norms = torch.tensor([450.0, 20.0]), torch.tensor([0.75, 1.5])
    >>> window.add(UpdateResult(losses[0], 90, 600, norms[0], flops=1e9))
    >>> window.add(UpdateResult(losses[1], 10, 70, norms[1], flops=1e8))
    >>> metrics = window.metrics(rate=1e-3)
    >>> metrics["train/loss"], metrics["train/gradient_norm"]
    (4.7, 1.5)

    A loss is a mean, because single updates jump; the length of the gradient is the last one's,
    because a mean would hide the jump that one looks for. A CPU has no known peak, and so no MFU:

    >>> "perf/mfu" in metrics
    False
    """

    def __init__(self, tracker: Tracker, device: torch.device, bf16: bool) -> None:
        self._tracker = tracker
        self._device = device
        self._peak_flops = peak_flops(device_name(device), bf16)
        self.stopwatch = Stopwatch()
        self._results: list[UpdateResult] = []

    def add(self, result: UpdateResult) -> None:
        self._results.append(result)

    def log(self, step: int, rate: float) -> None:
        """Send a line of metrics, and begin anew."""
        self._tracker.log(step, self.metrics(rate))
        self._results.clear()
        self.stopwatch = Stopwatch()

    def metrics(self, rate: float) -> dict[str, float]:
        """Return the numbers of a line, by the names of `tracking.py`."""
        predicted = sum(result.num_predicted for result in self._results)
        tokens = sum(result.num_tokens for result in self._results)
        # Updates without a predicted token are possible, and so is a line of nothing but these.
        losses, norms = _values(self._results)
        loss = sum(losses) / max(predicted, 1)
        seconds = max(self.stopwatch.training, 1e-9)
        metrics = {
            "train/loss": loss,
            "train/bits": nats_to_bits(loss),
            "train/learning_rate": rate,
            "train/gradient_norm": norms[-1],
            "perf/tokens_per_second": tokens / seconds,
            "perf/predicted_per_second": predicted / seconds,
            "perf/data_wait": self.stopwatch.waiting / seconds,
            "memory/peak_gb": memory_peak(self._device),
        }
        # Tokens are those of all ranks, operations this rank's, beside the peak of its own device.
        if self._peak_flops is not None:
            flops = sum(result.flops for result in self._results)
            metrics["perf/mfu"] = flops / seconds / self._peak_flops
        return metrics
