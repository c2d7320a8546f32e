"""Fast dropout on a CPU.

Dropout sets each number to zero with probability p and divides the others by 1 - p, which keeps the
mean. PyTorch on a CPU draws one Bernoulli number after the other, which for the attention weights
of a layer takes as long as the matrix products of its forward pass. Here one random word of 64 bits
decides for four numbers, 16 bits each, in a tenth of the time (`docs/performance.md`):

    65536 values     0 ........ 6553 | 6554 ......................... 65535
    p = 0.1             dropped      |              kept

So p is rounded to a 65536th, and the scale of what is kept follows the rounded p:

>>> threshold(0.1), round(1 / scale(0.1), 6)
(6554, 0.899994)

The bits come from PyTorch's global generator, in one thread: the same for any number of threads. On
a GPU this is PyTorch's own dropout, which draws inside its kernel.

Next: `mpnet/optimizer.py`, what a gradient does to the weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16
"""Values of 16 random bits."""


class Dropout(nn.Module):
    """Dropout as a module, which `eval` switches off."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Drop some of the values, of any shape."""
        return dropout(values, self.p) if self.training else values


def dropout(values: Tensor, p: float) -> Tensor:
    """Drop values with probability p and scale the others; any shape, any device.

    >>> _ = torch.manual_seed(8)
    >>> dropout(torch.ones(2, 6), 0.5)
    tensor([[2., 2., 2., 2., 0., 2.],
            [2., 2., 0., 2., 0., 2.]])
    """
    if values.device.type != "cpu":
        return F.dropout(values, p)
    if threshold(p) == 0:
        return values
    # The backward pass keeps the booleans, a byte per number where PyTorch's dropout keeps four.
    return (values * draw_kept(values, p)).mul_(scale(p))


def threshold(p: float) -> int:
    """Return how many of the random values drop a number: not all of them, however large p is."""
    return min(round(p * LEVELS), LEVELS - 1)


def scale(p: float) -> float:
    """Return the factor of the numbers that are kept."""
    return LEVELS / (LEVELS - threshold(p))


def draw_kept(like: Tensor, p: float) -> Tensor:
    """Draw which numbers of a tensor are kept: booleans of its shape, on the CPU."""
    return draw_levels(like) >= threshold(p) - LEVELS // 2


def draw_levels(like: Tensor) -> Tensor:
    """Draw 16 random bits for each number of a tensor, as signed integers from -32768."""
    count = like.numel()
    # `randint` cannot return its upper bound: one of the 2^64 words is never drawn.
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 3) // 4,), dtype=torch.int64)
    return words.view(torch.int16)[:count].view(like.shape)
