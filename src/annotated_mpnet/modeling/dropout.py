"""Dropout that does not take longer than what it drops.

Dropout sets each number to zero with probability p and divides the others by 1 - p, so that sums
stay what they were on average. Only *which* numbers must be random, and for that 16 random bits a
number are plenty. PyTorch's dropout on a CPU draws for each number from a Bernoulli distribution,
one after the other, and keeps a float of zero or one for each on the way back.

What that costs in MPNet-base, for four rows of 512 tokens: a layer of the `mpnet` objective has 17
million weights of attention, which all have to be drawn for:

>>> H, L, P = 12, 512, 76
>>> round(4 * H * (L * L + 2 * P * (L + P)) / 1e6, 1)
16.9

and two cores need 0.2 seconds for them, as long as for the matrix products of the same layer's
forward pass. Random bits come in words of 64, of which each is four numbers of 16 bits here; they
take a tenth of that (`docs/log.md`). A number is kept if it is large enough:

    65536 values     0 ........ 6553 | 6554 ......................... 65535
    p = 0.1             dropped      |              kept

>>> threshold(0.1)
6554

So p is rounded to a 65536th, 0.100006 in place of 0.1; the factor for what is kept is that of the
rounded one, and the mean is right to the last digit:

>>> _ = torch.manual_seed(0)
>>> kept = draw_kept(torch.zeros(1000, 1000), 0.1)
>>> kept.dtype, round(kept.float().mean().item(), 3), round(1 / scale(0.1), 6)
(torch.bool, 0.9, 0.899994)

The bits are drawn from PyTorch's global generator like all others, so that `seed_dropout`
(`training/trainer.py`) decides them, and in one thread: the same for any number of threads.

On a GPU, PyTorch draws within the kernel that multiplies, in no time; there this is `F.dropout`.

Next: `blocked_attention.py`, whose weights are most of what is dropped.
"""

import torch
import torch.nn.functional as F
from torch import nn

LEVELS = 2**16
"""Random values of a number: 16 bits."""


class Dropout(nn.Module):
    """Dropout as a module, which `eval` switches off."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Drop some of the values, of any shape."""
        return dropout(values, self.p) if self.training else values


def dropout(values: torch.Tensor, p: float) -> torch.Tensor:
    """Return values with some of them dropped, and the others scaled; of any shape and device.

    >>> _ = torch.manual_seed(8)
    >>> dropout(torch.ones(2, 6), 0.5)
    tensor([[2., 2., 2., 2., 0., 2.],
            [2., 2., 0., 2., 0., 2.]])
    """
    if values.device.type != "cpu":
        return F.dropout(values, p)
    if threshold(p) == 0:
        return values
    # The way back of a product needs the other factor: a byte for each number, where PyTorch's own
    # keeps four.
    return (values * draw_kept(values, p)).mul_(scale(p))


def threshold(p: float) -> int:
    """Return how many of the random values mean that a number is dropped."""
    return round(p * LEVELS)


def scale(p: float) -> float:
    """Return the factor of what is kept."""
    return LEVELS / (LEVELS - threshold(p))


def draw_kept(like: torch.Tensor, p: float) -> torch.Tensor:
    """Draw what is kept: booleans of the shape of a tensor, contiguous, on the CPU."""
    return _draw_levels(like) >= threshold(p) - LEVELS // 2


def mark_dropped(positive: torch.Tensor, p: float) -> None:
    """Draw what is dropped, and write it into the signs of a tensor of numbers >= 0, in place.

    It costs no memory: that of the numbers says it. What was dropped is negative then, and the
    number itself is still there.

    >>> _ = torch.manual_seed(8)
    >>> weights = torch.full((2, 6), 0.25)
    >>> mark_dropped(weights, 0.5)
    >>> weights
    tensor([[ 0.2500,  0.2500,  0.2500,  0.2500, -0.2500,  0.2500],
            [ 0.2500,  0.2500, -0.2500,  0.2500, -0.2500,  0.2500]])

    Args:
        positive: contiguous; of a floating-point type, whose first bit is the sign.
        p: how many, as a share.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[positive.element_size()]
    # Compared in place, the 16-bit numbers become ones and zeros: nothing is converted to booleans
    # and back, which takes longer than the comparison.
    dropped = _draw_levels(positive).lt_(threshold(p) - LEVELS // 2)
    sign = dropped.to(whole).bitwise_left_shift_(8 * positive.element_size() - 1)
    positive.view(whole).bitwise_or_(sign)


def _draw_levels(like: torch.Tensor) -> torch.Tensor:
    """Draw 16 random bits for each number of a tensor, as signed numbers."""
    count = like.numel()
    # Whole words of 64 bits. Of their 2^64 values the largest is left out, which nobody will miss.
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 3) // 4,), dtype=torch.int64)
    # As signed numbers, 16 bits go from -32768 on.
    return words.view(torch.int16)[:count].view(like.shape)
