"""The training loop.

    for each update u = 0, 1, 2, ...
        for each micro-batch m of the update
            seed dropout with (seed, u, m)
            add to the gradients:  d/dw  loss_sum(batch) / N
        clip the gradient; stop if the loss or the gradient is NaN or infinite
        set the learning rate of u, take a step of AdamW
        now and then: log, evaluate, save

`update` is the inner part, `train` the outer one; `evaluate` measures the loss on held-out text.

**How large is an update?** Paper, section 3.1: 8192 sequences of 512 tokens, of which 15 % are
predicted. No device holds that, so an update is cut into micro-batches, and their gradients are
added up before a single step. In micro-batches of 32 that is 256 of them on one GPU, or 32 on each
of eight. Either way N, the number of predicted tokens in the update, is about

>>> import numpy as np
>>> from annotated_mpnet.mpnet.masking import count_predicted
>>> 8192 * int(count_predicted(np.array(512 - 2), pred_prob=0.15))  # <s> and </s> are not predicted
622592

**Why is the loss divided as it is?** By N, not by the predicted tokens of each micro-batch, so that
each predicted token of an update weighs the same. Take a micro-batch with 90 tokens that lose 5
nats each, and one with 10 that lose 2. Their mean loss is (90 * 5 + 10 * 2) / 100 = 4.7. The mean
of the two means is 3.5, and gives each of the ten tokens nine times the weight of one of the
ninety. Divided by N, the gradient without dropout is that of one large batch, however it was cut.
(HF: the Trainer passes the token count to the model, but `MPNetForMaskedLM` ignores it: the
gradient is the *sum* of the micro-batches' means.)

**Why is a resume exact?** Everything random is a function of u and m, and an evaluation draws
nothing. So a run that was interrupted, or evaluated more often, ends in the same bits on the same
machine with the same number of threads.

This is the last chapter of the book. Around it: `runs/hooks.py`.

    B batch   P predicted tokens   V vocabulary
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import InputMode, OptimizationConfig
from annotated_mpnet.mpnet.optimizer import learning_rate, set_learning_rate
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining, cross_entropy_sum
from annotated_mpnet.mpnet.randomness import fold_in_seed


def update(setup: Setup, number: int, micro_batches: list[Batch]) -> UpdateResult:
    """Take one optimizer step, on the gradient of several micro-batches.

    A micro-batch is gone, activations and all, before the next one begins; only its gradient stays.
    So the memory needed is that of one micro-batch, however many there are.

    Args:
        setup: what is trained, and how.
        number: of the update, from 0. It decides the learning rate and, with the seed, dropout.
        micro_batches: at least one.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite. Weights and optimizer are
            unchanged.
    """
    network, optimizer = setup.network, setup.optimizer
    # Both counts are plain numbers: the device need not be asked.
    counts = network.sum_counts(
        sum(batch.num_predicted for batch in micro_batches),
        sum(batch.num_tokens for batch in micro_batches),
    )
    num_predicted, num_tokens = (int(count) for count in counts)
    loss_sum = torch.zeros((), device=network.device)
    if num_predicted == 0:
        # Without a gradient there must be no step: AdamW would still move the weights, by momentum
        # and decay. The count is that of all ranks, so all of them return here.
        return UpdateResult(loss_sum, 0, num_tokens, torch.zeros_like(loss_sum))

    network.model.train()
    # To None, not to 0: a parameter without a gradient then takes no step.
    optimizer.zero_grad(set_to_none=True)
    for m, batch in enumerate(micro_batches):
        seed_dropout(setup.seed, number, m, network.rank)
        with network.sync_gradients(m == len(micro_batches) - 1):
            loss_sum += setup.add_gradient(setup, batch, num_predicted)
    loss_sum = network.sum_on_device(loss_sum)
    gradient_norm = clip_gradients(network, setup.optimization.clip_grad_norm)
    # Between the gradient and the step: one NaN is enough to lose every weight.
    setup.check_finite(number, loss_sum, gradient_norm)
    set_learning_rate(optimizer, learning_rate(number, setup.optimization))
    optimizer.step()
    return UpdateResult(loss_sum, num_predicted, num_tokens, gradient_norm)


def add_gradient(setup: Setup, batch: Batch, num_predicted: int | Tensor) -> Tensor:
    """Add a micro-batch's share of an update's gradient to `.grad`; return its summed loss.

    Args:
        setup: what is trained, and how.
        batch: the micro-batch.
        num_predicted: N, of the whole update.
    """
    network = setup.network
    batch = batch.to(network.device)
    # Under autocast, matrix products run in bfloat16; weights, gradients, norms and the loss stay
    # in float32. The backward pass takes each type from the forward pass.
    with setup.autocast:
        loss = network.loss_sum(batch, setup.input_mode)
    # Ranks average their gradients, where the update needs the sum: hence `num_ranks`.
    share = loss * network.num_ranks / num_predicted
    share.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def train(
    setup: Setup,
    progress: Progress,
    updates: Iterator[tuple[list[Batch], Any]],
    hooks: Hooks,
) -> Progress:
    """Train to the last update, or until `hooks.should_stop`; return where the run stands then.

    After an update the order is not free:

        log       first, because evaluating and saving take time that is not training
        evaluate  may find a new best loss, which is part of the progress
        save      keeps that progress; without the best loss in it, the first evaluation after a
                  resume would count as the best one
        stop      last, when nothing is left half done

    The last update is always logged, evaluated and saved. An evaluation may take minutes, so a
    request to stop abandons it; the progress keeps that it is due, and a resume begins with it.

    Args:
        setup: what is trained, and how.
        progress: where to begin. It is replaced, never changed: a checkpoint that is being written
            in another thread keeps the one it was given.
        updates: the micro-batches of each update from there on, and the state of the text after it.
        hooks: everything around the updates.
    """
    total = setup.optimization.total_updates
    stop = False
    while not stop and (progress.evaluation_due or progress.update < total):
        if not progress.evaluation_due:
            micro_batches, text = next(updates)
            result = update(setup, progress.update, micro_batches)
            progress = progress.after(result, text)
            hooks.updated(progress, micro_batches, result)
            if _due(hooks.log_every, progress, total):
                hooks.log(progress)
            due = _due(hooks.evaluate_every, progress, total)
            progress = dataclasses.replace(progress, evaluation_due=due)
        if progress.evaluation_due and (bits := hooks.evaluate(progress)) is not None:
            progress = dataclasses.replace(progress, evaluation_due=False)
            # No comparison with NaN is true, so NaN never becomes the best.
            if bits < progress.best_valid_bits:
                progress = dataclasses.replace(progress, best_valid_bits=bits)
                hooks.save(progress, best=True)
        stop = hooks.should_stop()
        if stop or _due(hooks.save_every, progress, total):
            hooks.save(progress, best=False)
    return progress


def _due(interval: int, progress: Progress, total: int) -> bool:
    return progress.update == total or (interval > 0 and progress.update % interval == 0)


@torch.no_grad()
def evaluate(setup: Setup, batches: Iterable[Batch]) -> Evaluation:
    """Measure the loss over this rank's batches, without dropout. Draws no random number.

    A fresh network knows nothing and needs log2(V) bits, 14.9 with MPNet's vocabulary. Training
    soon reaches the unigram plateau, where the network knows how frequent each token is and ignores
    the context; leaving that takes longer (`mpnet/local_start.py`). If the loss ever falls towards
    0, a query sees the token it predicts.

    Returns:
        The means over the predicted tokens of all ranks; NaN if there are none.
    """
    network = setup.network
    network.model.eval()
    loss_sum = correct = num_predicted = 0.0
    for batch in batches:
        moved = batch.to(network.device)
        with setup.autocast:
            logits_BPV = network.model(
                moved.input_ids,
                moved.predicted_positions,
                moved.predicted_ids,
                moved.attention_mask,
                setup.input_mode,
            )
        # An empty slot predicts nothing and must not count, neither as wrong nor as right.
        used_BP = moved.predicted_ids != NOT_PREDICTED
        # Python's floats have 53 bits; float32's 24 would not do for a million tokens.
        loss_sum += cross_entropy_sum(logits_BPV, moved.predicted_ids).item()
        correct += ((logits_BPV.argmax(-1) == moved.predicted_ids) & used_BP).sum().item()
        num_predicted += batch.num_predicted
    network.reshard()
    loss_sum, correct, num_predicted = network.sum_counts(loss_sum, correct, num_predicted)
    if num_predicted == 0:
        return Evaluation(math.nan, math.nan)
    return Evaluation(loss_sum / num_predicted / math.log(2), correct / num_predicted)


def seed_dropout(seed: int, number: int, micro_batch: int, rank: int) -> None:
    """Seed PyTorch's generator, so dropout depends on the place in the run and not on the past.

    >>> def dropped(*place):
    ...     seed_dropout(12345, *place)
    ...     return nn.functional.dropout(torch.ones(100)).count_nonzero(), torch.rand(1)
    >>> first = dropped(7, 0, 0)
    >>> _ = torch.rand(1000)
    >>> dropped(7, 0, 0) == first
    True
    >>> dropped(7, 0, 1) == first  # another rank drops other places of its other sequences
    False
    """
    # The hash has 128 bits; `manual_seed` takes 63.
    torch.manual_seed(fold_in_seed(seed, "dropout", number, micro_batch, rank) % 2**63)


def clip_gradients(network: Network, longest: float) -> Tensor:
    """Shorten the gradient to the longest allowed (0: no limit); return the norm it had before.

    Now and then the gradient of an update is many times as long as usual. AdamW divides by the
    usual length, so a single long gradient would stay in its means for the next 50 updates. One
    factor shortens all of it, so the direction stays:

    >>> model = nn.Linear(1, 2, bias=False)
    >>> model.weight.grad = torch.tensor([[30.0], [40.0]])
    >>> clip_gradients(Network(model, torch.device("cpu")), 1.0), model.weight.grad.flatten()
    (tensor(50.), tensor([0.6000, 0.8000]))

    One NaN makes the norm NaN, and with it every gradient, and after the step every weight:

    >>> model.weight.grad = torch.tensor([[math.nan], [40.0]])
    >>> clip_gradients(Network(model, torch.device("cpu")), 1.0), model.weight.grad.flatten()
    (tensor(nan), tensor([nan, nan]))
    """
    parameters = list(network.model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if longest > 0:
        nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return network.full_tensor(norm)


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of an update is NaN or infinite; the update was not applied."""


def check_finite(number: int, loss: Tensor, gradient_norm: Tensor) -> None:
    """Raise a `NonFiniteError` if one of the two is NaN or infinite.

    Both, because a backward pass can overflow after a normal loss. Looking at a number makes the
    CPU wait for the device; `training/trainer.py` has a check for GPUs that does not.

    >>> check_finite(4, torch.tensor(5.25), torch.tensor(math.inf))
    Traceback (most recent call last):
    annotated_mpnet.mpnet.loop.NonFiniteError: the gradient norm of update 5 is inf
    """
    for name, value in (("loss", loss.item()), ("gradient norm", gradient_norm.item())):
        if not math.isfinite(value):
            raise NonFiniteError(f"the {name} of update {number + 1} is {value}")


class Network:
    """The model as the loop calls it: on one device, in one process.

    With several processes (*ranks*), each computes the gradient of its own micro-batches.
    `training/distributed.py` overrides what they must exchange.
    """

    rank = 0
    num_ranks = 1

    def __init__(self, model: MPNetForPretraining, device: torch.device) -> None:
        self.model = model
        self.device = device

    def loss_sum(self, batch: Batch, input_mode: InputMode) -> Tensor:
        """Return the summed loss over a batch of this rank, ready for `backward`."""
        return self.model.loss_sum(batch, input_mode)

    def sync_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Average the gradients over the ranks, in the passes of an update's last micro-batch."""
        return nullcontext()

    def sum_counts(self, *counts: float) -> Sequence[float]:
        """Return the sum of each count over all ranks."""
        return counts

    def sum_on_device(self, scalar: Tensor) -> Tensor:
        """Return the sum of a scalar over all ranks, without waiting for the device."""
        return scalar

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor that may be sharded over the ranks."""
        return tensor

    def reshard(self) -> None:
        """End a forward pass that has no backward pass."""


@dataclass(frozen=True)
class Setup:
    """What is trained, and how: all that an update depends on beside its number and its batches.

    Attributes:
        autocast: the context of the forward pass, such as `torch.autocast` in bfloat16.
        check_finite: called between the gradient and the step.
        add_gradient: called for each micro-batch.
    """

    network: Network
    optimizer: Optimizer
    optimization: OptimizationConfig
    input_mode: InputMode = "mpnet"
    seed: int = 12345
    autocast: AbstractContextManager[Any] = field(default_factory=nullcontext)
    check_finite: Callable[[int, Tensor, Tensor], None] = check_finite
    add_gradient: Callable[[Setup, Batch, int], Tensor] = add_gradient


class Hooks:
    """What happens around the updates. Here nothing; `runs/hooks.py` logs, evaluates and saves.

    The intervals are in updates; 0 or less means only at the end.
    """

    log_every = 0
    evaluate_every = 0
    save_every = 0

    def updated(self, progress: Progress, micro_batches: list[Batch], result: UpdateResult) -> None:
        """Count an update."""

    def log(self, progress: Progress) -> None:
        """Record metrics of the updates since the last call."""

    def evaluate(self, progress: Progress) -> float | None:
        """Return the bits per predicted token on validation text; NaN without one.

        None if it was abandoned because the run is to stop; then `should_stop` is true.
        """
        return math.nan

    def save(self, progress: Progress, best: bool) -> None:
        """Keep a checkpoint, of a regular interval or of the best validation loss so far."""

    def should_stop(self) -> bool:
        """Return whether to stop before the last update. All ranks must return the same."""
        return False


@dataclass(frozen=True)
class UpdateResult:
    """What one update saw, over all ranks.

    The loss is a sum, so means over several updates can weight each token alike. The two tensors
    are scalars on the device, where they may not be computed yet: reading one waits for it.
    """

    loss_sum: Tensor
    num_predicted: int
    num_tokens: int
    gradient_norm: Tensor


@dataclass(frozen=True)
class Evaluation:
    """The loss per predicted token, in bits, and the share that the network ranks first."""

    bits: float
    accuracy: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands: with the weights and AdamW's means, all that a resume needs.

    Batches are made ahead of the updates, in another thread. Files do not mind, because their batch
    k is a function of k. A stream is further than the training, so each update carries the state of
    the stream after it. With two updates made ahead:

        updates done            0  1  2
        batches made            0  1  2  3  4
        the stream is after                 4     a resume from here would skip 3 and 4
        `text` is after               2

    Attributes:
        update: updates done, which is also the number of the next one.
        best_valid_bits: of the evaluations so far.
        text: the state of the stream; None for text that is read by number.
        evaluation_due: the evaluation after this update was abandoned.
    """

    update: int = 0
    tokens_seen: int = 0
    predicted_seen: int = 0
    best_valid_bits: float = math.inf
    text: Any = None
    evaluation_due: bool = False

    def after(self, result: UpdateResult, text: Any) -> Progress:
        """Return the progress after an update. One without a predicted token counts too."""
        return dataclasses.replace(
            self,
            update=self.update + 1,
            tokens_seen=self.tokens_seen + result.num_tokens,
            predicted_seen=self.predicted_seen + result.num_predicted,
            text=text,
        )
