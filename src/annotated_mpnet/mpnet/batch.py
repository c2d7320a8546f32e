"""The batch: all that the data side tells the model.

MPNet needs a BERT batch plus an *order*: which positions are predicted, and in which sequence. A
batch holds just that. The model derives the rest (the permutation, the second stream and the
attention masks of the paper) from it.

Two sentences, "the task is sentence labelling" and "read this". In the first, "sentence" is
predicted and then "task"; in the second, only "this":

    input_ids             the   [M]   is    [M]   labelling
                          read  [M]   <pad> <pad> <pad>
    attention_mask        1     1     1     1     1
                          1     1     0     0     0
    predicted_positions   3     1             P = 2, the most that a sequence here predicts
                          1     (any)
    predicted_ids         sentence  task
                          this      -100
    num_tokens 7          num_predicted 3

Hugging Face's batch for BERT has a label for each position instead. It cannot express an order,
and 85 % of its labels say "not predicted".

Next: `mpnet/two_stream.py`, what the model makes of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NOT_PREDICTED = -100
"""In `predicted_ids`, an empty slot: the sequence predicts fewer than P tokens. PyTorch's
cross-entropy ignores this number by default."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Frozen, because batches are built ahead in another thread.

    Attributes:
        input_ids: (B, L) int64, in natural order. In the modes `mpnet` and `mlm` each predicted
            token is already corrupted (a mask, a random token, or itself); in `plm` it is not.
        predicted_positions: (B, P) int64, in the order of prediction; anything in an empty slot.
        predicted_ids: (B, P) int64, the original tokens; `NOT_PREDICTED` in an empty slot.
        attention_mask: (B, L) int64, 1 for a real token and 0 for padding; None without padding.
            Where documents share a sequence, the number of each token's document, from 1.
        num_tokens: real tokens, for the throughput.
        num_predicted: predicted tokens, which the loss is divided by. Both counts are plain
            numbers: reading a sum from a GPU would make the CPU wait.
    """

    input_ids: Tensor
    predicted_positions: Tensor
    predicted_ids: Tensor
    attention_mask: Tensor | None
    num_tokens: int
    num_predicted: int

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device, in the background if they are pinned.

        A GPU works in order, so whatever uses the tensors comes after the copy.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copy the tensors into pinned memory, from which a GPU can copy in the background."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)
