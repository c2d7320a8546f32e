"""Where a token stands: absolute positions, and the relative position bias.

Attention by itself does not care in which order it meets its keys: permute them, and the result is
the same. That is what lets this project leave a sentence in its natural order while MPNet speaks of
permutations (`two_stream.py`); and it is why positions must be told explicitly. MPNet tells them
twice.

**Absolute.** Each position owns a vector that is added to the token's embedding. Position p of a
sentence uses row `p + pad_token_id + 1` of the table, so that with MPNet's padding id 1 no position
uses rows 0 and 1: fairseq counts from behind the padding id, and the released weights are laid out
so. Padding itself uses row `pad_token_id`, which is all zero.

**Relative.** Every head adds a learned number to its score for a pair (query at i, key at j), which
depends on j - i alone. In 512 tokens there are 1023 such distances, most of them seldom met: too
few examples for a number each. So T5 puts distances into buckets: near ones get a bucket each, far
ones share, ever more of them, and the keys to the right of the query use buckets of their own:

>>> here, there = torch.arange(5)[:, None], torch.arange(5)[None]  # queries down, keys across
>>> relative_position_bucket(there - here, num_buckets=32, max_distance=128)
tensor([[ 0, 17, 18, 19, 20],
        [ 1,  0, 17, 18, 19],
        [ 2,  1,  0, 17, 18],
        [ 3,  2,  1,  0, 17],
        [ 4,  3,  2,  1,  0]])

The same number all along each diagonal: this is why a sentence in natural order needs one bias for
the whole batch, where a permuted one needs its own. Of the 16 buckets of one direction, 0..7 are
exact; from there on each begins sqrt(2) times as far off as the one before, so that every second
one begins at twice the distance. Here they are, a mark for each distance up to 127:

>>> buckets = relative_position_bucket(-torch.arange(128), num_buckets=32, max_distance=128)
>>> for bucket in range(6, 16):
...     held = (buckets == bucket).nonzero().flatten().tolist()
...     print(f"bucket {bucket:2}: {held[0]:3} to {held[-1]:3}  {'#' * len(held)}")
bucket  6:   6 to   6  #
bucket  7:   7 to   7  #
bucket  8:   8 to  11  ####
bucket  9:  12 to  15  ####
bucket 10:  16 to  22  #######
bucket 11:  23 to  31  #########
bucket 12:  32 to  45  ##############
bucket 13:  46 to  63  ##################
bucket 14:  64 to  90  ###########################
bucket 15:  91 to 127  #####################################

From 128 on, `max_distance`, the formula gives bucket 16, which does not exist, and is cut off to
15. So the last bucket begins at 91 already, and beyond that all distances look the same, in T5, in
MPNet, and in Hugging Face's MPNet:

>>> relative_position_bucket(torch.tensor([-500, -91, -90, 90, 91, 500]), 32, 128).tolist()
[15, 15, 14, 30, 31, 31]

As in T5, one table of buckets x heads serves all the layers. Unlike T5, which knows no absolute
positions and does not divide its scores by sqrt(head_dim), MPNet adds it to what BERT has.
annotated-mpnet: rescales the buckets for long sequences; here they are what the configuration says.

Next: `local_start.py`, what the table holds before training; or `attention.py`, which adds the bias
to the scores.

    B batch   L tokens of a sentence   D embed_dim   H heads   Q rows that ask   M keys
    S steps of the bias   E their ends, S + 1   W distances
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.config import ModelConfig

NO_DISTANCE = 2**30
"""A distance that no two positions have."""


class LearnedPositionalEmbedding(nn.Embedding):
    """A learned vector for each absolute position (the paper's choice).

    With padding id 1, position 0 is row 2 and padding, position -1, is row 1, which stays zero and
    gets no gradient. For 512 positions there are 514 rows (which is what a Hugging Face config
    calls `max_position_embeddings`), and row 0 is never used at all.

    >>> config = ModelConfig(max_positions=512, encoder_embed_dim=12)
    >>> table = build_position_embedding(config)
    >>> table.weight.shape, table(torch.tensor([[-1]])).any().item()
    (torch.Size([514, 12]), False)
    """

    def __init__(self, max_positions: int, embed_dim: int, pad_token_id: int) -> None:
        super().__init__(max_positions + pad_token_id + 1, embed_dim, padding_idx=pad_token_id)
        self.first_row = pad_token_id + 1

    def forward(self, positions_BR: torch.Tensor) -> torch.Tensor:
        """Look up positions (B, R), counted from 0, and -1 for padding: (B, R, D)."""
        return super().forward(positions_BR + self.first_row)


class SinusoidalPositionalEmbedding(nn.Module):
    """A fixed vector for each position: sines in its first half, cosines in its second.

    The wavelengths form a geometric progression from 2 pi to 2 pi * 10000 ("Attention Is All You
    Need", 3.5). fairseq: sines and cosines stand in two halves instead of taking turns, and the
    argument is the row of the table, not the position, so that position 0 is sin(2) with MPNet's
    padding id. Nothing here is learned, and nothing is saved.

    Six wide there are three wavelengths: 2 pi, 100 times and 10000 times that. The first rows, for
    padding and positions 0 to 2; the first column is sin(2), sin(3), sin(4), and the slowest wave
    has hardly begun:

    >>> table = SinusoidalPositionalEmbedding(max_positions=512, embed_dim=6, pad_token_id=1)
    >>> for position, vector in zip(range(-1, 3), table(torch.tensor([[-1, 0, 1, 2]]))[0]):
    ...     print(f"{position:2}", *(f"{number:6.3f}" for number in vector))
    -1  0.000  0.000  0.000  0.000  0.000  0.000
     0  0.909  0.020  0.000 -0.416  1.000  1.000
     1  0.141  0.030  0.000 -0.990  1.000  1.000
     2 -0.757  0.040  0.000 -0.654  0.999  1.000
    """

    weight: torch.Tensor

    def __init__(self, max_positions: int, embed_dim: int, pad_token_id: int) -> None:
        super().__init__()
        self.first_row = pad_token_id + 1
        half = embed_dim // 2
        # fairseq: half - 1 steps from the first wavelength to the last, so that the last is 10000
        # times the first to the dot; the original formula never quite arrives there. The table is
        # made once, in float32: weights that were trained with these numbers expect them again.
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / max(half - 1, 1)))
        angles = torch.arange(max_positions + self.first_row)[:, None] * frequencies
        weight = torch.cat([angles.sin(), angles.cos()], dim=1)
        weight = F.pad(weight, (0, embed_dim - 2 * half))  # an odd width gets a column of zeros
        weight[pad_token_id] = 0
        # A buffer moves to the device with the model; not persistent, it is in no checkpoint, and a
        # checkpoint of a shorter table can be used with a longer one.
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, positions_BR: torch.Tensor) -> torch.Tensor:
        """Look up positions (B, R), counted from 0, and -1 for padding: (B, R, D)."""
        return F.embedding(positions_BR + self.first_row, self.weight)


def build_position_embedding(config: ModelConfig) -> nn.Module:
    """Return the absolute positions that the configuration asks for: (B, R) in, (B, R, D) out."""
    kinds = {
        "learned": LearnedPositionalEmbedding,
        "sinusoidal": SinusoidalPositionalEmbedding,
    }
    kind = kinds[config.position_embedding]
    return kind(config.max_positions, config.encoder_embed_dim, config.pad_token_id)


def relative_position_bucket(
    distance: torch.Tensor, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """Map signed distances (key position - query position, any shape) to buckets, as T5 does.

    The steps, their order and their float32 are those of fairseq and Hugging Face, because at the
    edge of a bucket another rounding of the logarithm would give another bucket. With n buckets in
    one direction, of which e = n / 2 are exact, and for a distance d from e on, it is

        e + floor((n - e) log(d / e) / log(max_distance / e)), and n - 1 at most

    With n = 16, e = 8 and 128, a distance of 32 is two of the four doublings from 8 to 128, half of
    the 8 steps: bucket 12.

    >>> relative_position_bucket(torch.tensor([-32, 32]), num_buckets=32, max_distance=128).tolist()
    [12, 28]
    """
    one_direction = num_buckets // 2
    exact = one_direction // 2
    magnitude = distance.abs()
    # `where` computes both branches for all distances. For 0 the logarithm would be -inf, which no
    # integer can hold; it is not chosen there, but must be finite.
    growth = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = exact + (growth * (one_direction - exact)).long()
    bucket = torch.where(magnitude < exact, magnitude, shared.clamp(max=one_direction - 1))
    # Keys to the right of the query use the upper half, of which bucket 16 itself is never used:
    # it would be distance 0 to the right, and 0 belongs to the left.
    return bucket + one_direction * (distance > 0)


class BiasSteps(NamedTuple):
    """The buckets in the order of distance: the bias, as a function of it, is a staircase.

    Attributes:
        bucket_S: (S,), the bucket of each step, from far to the left to far to the right.
        first_E: (S + 1,), the distance at which each step begins, and where the last one ends.
        step_W: (W,), the step of each distance from `-max_distance` to `max_distance`; beyond,
            nothing changes any more.
    """

    bucket_S: torch.Tensor
    first_E: torch.Tensor
    step_W: torch.Tensor


def bias_steps(num_buckets: int, max_distance: int) -> BiasSteps:
    """Return the steps of T5's buckets, on the CPU.

    With 8 buckets, 4 in each direction, of which 2 are exact, up to a distance of 8:

    >>> steps = bias_steps(num_buckets=8, max_distance=8)
    >>> steps.bucket_S.tolist(), steps.first_E[1:-1].tolist()
    ([3, 2, 1, 0, 5, 6, 7], [-3, -1, 0, 1, 2, 4])
    >>> steps.step_W.tolist()
    [0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 6, 6, 6, 6]

    So bucket 3 reaches from the left end to -4, bucket 2 from -3 to -2, and bucket 7 from 4 to the
    right end. (Bucket 4 would be distance 0 to the right, and is never used.)
    """
    with torch.device("cpu"):
        distance_W = torch.arange(-max_distance, max_distance + 1)
        one_direction = num_buckets // 2
        bucket_S = torch.arange(num_buckets - 1)
        bucket_S = torch.where(bucket_S < one_direction, one_direction - 1 - bucket_S, bucket_S + 1)
        bucket_W = relative_position_bucket(distance_W, num_buckets, max_distance)
        to_the_left_W = bucket_W < one_direction
        step_W = torch.where(to_the_left_W, one_direction - 1 - bucket_W, bucket_W - 1)
        # A step that no distance lies on begins where the next one does. Behind the ends of what
        # was looked at, the outer steps go on.
        inner = distance_W[torch.searchsorted(step_W, torch.arange(1, num_buckets - 1))]
        end = torch.tensor([NO_DISTANCE])
        return BiasSteps(bucket_S, torch.cat([-end, inner, end]), step_W)


class RelativePositionBias(nn.Embedding):
    """The table of buckets x heads that all layers share.

    In MPNet-base 32 x 12 = 384 numbers, its smallest parameter, but every score of a head has one
    of them in it. What a head learns here is how far, and to which side, it looks before it knows a
    single word. Where it starts decides how soon a run learns anything (`local_start.py`).
    """

    bucket_of_step: torch.Tensor
    first_distance: torch.Tensor
    step_of_distance: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.relative_attention_num_buckets, config.encoder_attention_heads)
        self.max_distance = config.relative_attention_max_distance
        # The same function as steps, for kernels that work it out themselves: the bucket of each
        # step (S,), where it begins (S + 1,), and the step of each distance (W,).
        # Buffers go along to the device; not persistent, they are in no checkpoint.
        steps = bias_steps(self.num_embeddings, self.max_distance)
        numbers = {
            "bucket_of_step": steps.bucket_S,
            "first_distance": steps.first_E,
            "step_of_distance": steps.step_W,
        }
        for name, each in numbers.items():
            self.register_buffer(name, each.int(), persistent=False)

    def for_pairs(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Return what is added to each head's scores of all pairs of a query and a key.

        Args:
            query_positions: (B, Q), or (1, Q) when it is the same for the whole batch.
            key_positions: (B, M) or (1, M).

        Returns:
            (B, H, Q, M) or (1, H, Q, M).
        """
        # From a bucket for each pair, (B, Q, M), to a number for each pair and head, (B, Q, M, H),
        # to the layout of scores. Laid out anew in memory once, because each layer will read it.
        distance_BQM = key_positions[:, None, :] - query_positions[:, :, None]
        bucket_BQM = relative_position_bucket(distance_BQM, self.num_embeddings, self.max_distance)
        return self(bucket_BQM).permute(0, 3, 1, 2).contiguous()
