"""The book's loop (`mpnet/loop.py`) as a run calls it: on its device, with its settings."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from annotated_mpnet.errors import DivergedError
from annotated_mpnet.fast.compilation import uncompiled
from annotated_mpnet.mpnet import loop
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import InputMode, OptimizationConfig
from annotated_mpnet.training.distributed import SharedNetwork


class Reporter(Protocol):
    """What the rooms below `tracking/` need of its `Tracker`."""

    def say(self, text: str) -> None:
        """Print a line."""

    def warn(self, text: str) -> None:
        """Print a line that the reader should not miss."""


class DeferredCheck:
    """Refuses NaN and infinite updates on a GPU without making the CPU wait for it.

    To decide by an `if`, the CPU waits until the GPU has computed the loss, and then the GPU waits
    until the CPU has said what is next:

        asked each time     CPU  u1 ....wait.... u2 ....wait.... u3 ....wait
                            GPU     u1 u1 u1        u2 u2 u2        u3 u3 u3
        not asked           CPU  u1 u2 u3  ...and so on, until a line is logged
                            GPU     u1 u1 u1 u2 u2 u2 u3 u3 u3

    So the GPU decides. A flag in its memory becomes 1 with the first update that is not finite and
    stays 1, and while it is 1, the fused AdamW changes nothing (`found_inf`, which PyTorch made for
    float16). The CPU looks before it logs, evaluates or saves, and raises the same error about the
    same update. No update after that one was applied.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.AdamW([weight], fused=True)
    >>> check = DeferredCheck(optimizer, torch.device("cpu"))
    >>> for update, gradient in enumerate((1.0, float("nan"), 1.0)):
    ...     weight.grad = torch.tensor([gradient])
    ...     check(update, torch.tensor(5.25), weight.grad.norm())
    ...     optimizer.step()
    ...     print(round(weight.item(), 3), optimizer.state[weight]["step"].item())
    0.999 1.0
    0.999 1.0
    0.999 1.0
    >>> check.look()
    Traceback (most recent call last):
    annotated_mpnet.mpnet.loop.NonFiniteError: the gradient norm of update 2 is nan
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._halted = torch.zeros((), device=device)
        self._unread: list[tuple[int, Tensor, Tensor]] = []
        optimizer.found_inf = self._halted  # type: ignore[attr-defined]

    def __call__(self, number: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """Note an update, without looking at it."""
        self._unread.append((number, loss, gradient_norm))
        bad = ~(loss.isfinite() & gradient_norm.isfinite())
        # In place, because the optimizer holds this tensor.
        torch.maximum(self._halted, bad.float(), out=self._halted)

    def look(self) -> None:
        """Wait for the device, and check the updates since the last look."""
        unread, self._unread = self._unread, []
        if unread:
            # Stacked: two copies from the device in all, not two per update.
            losses = torch.stack([loss for _, loss, _ in unread]).cpu()
            norms = torch.stack([norm for _, _, norm in unread]).cpu()
            for (number, _, _), loss, norm in zip(unread, losses, norms, strict=True):
                loop.check_finite(number, loss, norm)


class Trainer:
    """One model in training.

    Attributes:
        network: on its device, shared by the ranks.
        optimizer: of the model's parameters.
        optimization: the settings of the optimizer and its schedule.
        input_mode: the objective.
        bf16: whether matrix products run in bfloat16.
        tracker: where messages go.
    """

    def __init__(
        self,
        network: SharedNetwork,
        optimizer: Optimizer,
        optimization: OptimizationConfig,
        input_mode: InputMode,
        seed: int,
        bf16: bool,
        tracker: Reporter,
        add_gradient: Callable[[loop.Setup, Batch, int], Tensor] = loop.add_gradient,
    ) -> None:
        self.network = network
        self.model = network.model
        self.world = network.world
        self.optimizer = optimizer
        self.optimization = optimization
        self.input_mode = input_mode
        self.bf16 = bf16
        self.tracker = tracker
        device = network.device
        self._setup = loop.Setup(
            network,
            optimizer,
            optimization,
            input_mode,
            seed,
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16),
            add_gradient=add_gradient,
        )
        self._deferred: DeferredCheck | None = None
        # With FSDP, PyTorch promises nothing about AdamW's flag.
        if device.type == "cuda" and not network.is_sharded:
            self.look_later()

    def look_later(self) -> None:
        """Check updates when `catch_up` is called, and not each time. For a GPU."""
        self._deferred = DeferredCheck(self.optimizer, self.network.device)
        self._setup = replace(self._setup, check_finite=self._deferred)

    def catch_up(self) -> None:
        """Wait for the device, and check the updates made since the last time.

        Raises:
            DivergedError: one was NaN or infinite. Neither it nor any later one was applied.
        """
        if self._deferred is not None:
            with self._explaining_divergence():
                self._deferred.look()

    def update(self, number: int, micro_batches: list[Batch]) -> loop.UpdateResult:
        """Make an update, the first of which has number 0.

        Raises:
            DivergedError: the loss or the gradient is NaN or infinite; it was not applied.
        """
        with self._explaining_divergence():
            return loop.update(self._setup, number, micro_batches)

    def train(
        self, progress: loop.Progress, updates: Iterator[tuple[list[Batch], Any]], hooks: loop.Hooks
    ) -> loop.Progress:
        """Run the loop; see `mpnet/loop.py`. Raises as `update` does."""
        with self._explaining_divergence():
            return loop.train(self._setup, progress, updates, hooks)

    def evaluate(self, batches: Iterable[Batch]) -> loop.Evaluation:
        """Measure the loss over this rank's batches. With --fsdp all ranks need equally many."""
        with uncompiled():
            return loop.evaluate(self._setup, batches)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return the logits of the predicted tokens, (B, P, V), in float32 on the CPU.

        Args:
            batch: the same on all ranks.
        """
        self.model.eval()
        moved = batch.to(self.network.device)
        with uncompiled(), self._setup.autocast:
            logits_BPV: Tensor = self.model(
                moved.input_ids,
                moved.predicted_positions,
                moved.predicted_ids,
                moved.attention_mask,
                self.input_mode,
            )
        self.network.reshard()
        return logits_BPV.float().cpu()

    @contextmanager
    def _explaining_divergence(self) -> Iterator[None]:
        try:
            yield
        except loop.NonFiniteError as error:
            # Its frames hold the graph and, through it, DDP; see `SharedNetwork.close`.
            traceback.clear_frames(error.__traceback__)
            raise DivergedError(
                f"{error}; it was not applied, and the checkpoints are from before it: resume from "
                f"one with a lower --lr (now {self.optimization.lr:g}), a longer "
                "--warmup-updates, or a smaller --clip-grad-norm"
            ) from error
