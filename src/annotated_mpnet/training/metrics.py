"""The numbers of a line of metrics: sums over the updates since the line before."""

import math
import time

import torch

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.loop import UpdateResult
from annotated_mpnet.training.throughput import (
    device_name,
    memory_peak,
    peak_flops,
    training_flops,
)
from annotated_mpnet.training.trainer import Trainer


class MetricsWindow:
    """Collects updates and their time until a line is logged.

    Means are taken over tokens, not over updates, as in the loss itself (`mpnet/loop.py`). The
    gradient norm is the last one, because a mean would hide the jumps one looks for.

    The clock measures training and, within it, waiting for batches. It runs on from update to
    update, and is paused for evaluations and checkpoints. Pause it after `Trainer.catch_up`, or it
    misses what the GPU still has to do.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._model_config = trainer.model.config
        self._input_mode = trainer.input_mode
        self._device = trainer.network.device
        self._peak_flops = peak_flops(device_name(self._device), trainer.bf16)
        self._started: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._results: list[UpdateResult] = []
        self._flops = self._training = self._waiting = 0.0

    def wait_for_batches(self) -> None:
        """Start the clock, or let it run on, and count the time as waiting."""
        self._asked = time.perf_counter()
        if self._started is None:
            self._started = self._asked

    def batches_arrived(self) -> None:
        """Count the time as waiting no longer."""
        self._waiting += time.perf_counter() - self._asked

    def pause(self) -> None:
        """Stop the clock until batches are asked for again."""
        if self._started is not None:
            self._training += time.perf_counter() - self._started
            self._started = None

    def add(self, micro_batches: list[Batch], result: UpdateResult) -> None:
        """Count an update."""
        self._results.append(result)
        if result.num_predicted == 0:
            return
        for batch in micro_batches:
            # Of shapes: padding and empty slots are computed too.
            (batch_size, length), slots = batch.input_ids.shape, batch.predicted_ids.shape[1]
            self._flops += training_flops(
                self._model_config, self._input_mode, batch_size, length, slots
            )

    def take(self, rate: float) -> dict[str, float]:
        """Return the metrics, by the names of `tracking/tracker.py`, and begin anew."""
        predicted = sum(result.num_predicted for result in self._results)
        tokens = sum(result.num_tokens for result in self._results)
        # Stacked, to wait once for the device.
        losses = torch.stack([result.loss_sum for result in self._results]).tolist()
        # A window may hold nothing but updates without a predicted token.
        loss = sum(losses) / max(predicted, 1)
        seconds = max(self._training, 1e-9)
        metrics = {
            "train/loss": loss,
            "train/bits": loss / math.log(2),
            "train/learning_rate": rate,
            "train/gradient_norm": self._results[-1].gradient_norm.item(),
            "perf/tokens_per_second": tokens / seconds,
            "perf/predicted_per_second": predicted / seconds,
            "perf/data_wait": self._waiting / seconds,
            "memory/peak_gb": memory_peak(self._device),
        }
        # Tokens are those of all ranks; operations and peak are this rank's.
        if self._peak_flops is not None:
            metrics["perf/mfu"] = self._flops / seconds / self._peak_flops
        self._clear()
        return metrics
