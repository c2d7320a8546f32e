"""The batch: what the data side hands to the model, and the only thing that both sides know.

MPNet needs no more than BERT does, plus an *order*: which positions are predicted, and in which
sequence. That is all there is in a batch. No permuted copy of the sentence, no attention masks, no
second stream: the model derives them (`mpnet/two_stream.py`).

Two sentences, "the task is sentence labelling" and "read this". Of the first, "sentence" is
predicted and then "task"; of the second, only "this":

    input_ids             the   [M]   is    [M]   labelling
                          read  [M]   <pad> <pad> <pad>
    attention_mask        1     1     1     1     1
                          1     1     0     0     0
    predicted_positions   3     1             P = 2, the most that a row predicts
                          1     (any)
    predicted_ids         sentence  task
                          this      -100
    num_tokens 7          num_predicted 3

BERT's batch in Hugging Face has labels of the shape of the sentence instead. They cannot say in
which order, and with 15 % predicted, 85 % of them say "not me".

The two counts are plain numbers, known to the CPU from the start: to ask a tensor on a GPU for its
sum would make the CPU wait for it, once for each micro-batch.

Next: `mpnet/two_stream.py`, which makes rows of it; or `mpnet/collator.py`, which makes it.

    B batch   L tokens of a sentence   P predicted tokens
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

NOT_PREDICTED = -100
"""What stands in `predicted_ids` where a row predicts fewer than P tokens. The number is PyTorch's
own (`ignore_index` of the cross-entropy), so that such a slot is left out of the loss without any
further mask."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch.

    Ids are int64, because that is what PyTorch's `gather` takes; at 512 tokens a row that is 4 kB,
    so that nothing is gained by smaller ones. Frozen: a batch that is made ahead, in another
    thread, is nobody's to change.

    Attributes:
        input_ids: (B, L) int64. The sentence in natural order. In the modes `mpnet` and `mlm` each
            predicted token is already replaced by its stand-in (mask, random token, or itself); in
            `plm` it is the original.
        predicted_positions: (B, P) int64. Where the predicted tokens stand, in the order of their
            prediction. Anything in an empty slot.
        predicted_ids: (B, P) int64. The original tokens there; `NOT_PREDICTED` in an empty slot.
        attention_mask: (B, L) int64, 1 for a real token and 0 for padding; None when no row is
            padded. Where documents share a row, the number of each token's document, from 1.
        num_tokens: real tokens in the batch, padding not counted: what throughput is measured in.
        num_predicted: predicted tokens in the batch: what the loss is divided by.
    """

    input_ids: torch.Tensor
    predicted_positions: torch.Tensor
    predicted_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    num_tokens: int
    num_predicted: int

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device, without waiting for the copy where the memory is pinned.

        The GPU works through what it is told in order, so that whatever uses the tensors comes
        after their copy by itself. Memory that is not pinned may be moved by the operating system
        at any time, and then the CPU has to wait.
        """
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copy the tensors into pinned memory; without a GPU there is none."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        mask = self.attention_mask
        return Batch(
            input_ids=change(self.input_ids),
            predicted_positions=change(self.predicted_positions),
            predicted_ids=change(self.predicted_ids),
            attention_mask=None if mask is None else change(mask),
            num_tokens=self.num_tokens,
            num_predicted=self.num_predicted,
        )
