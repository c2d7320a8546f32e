"""Where a token is: absolute positions, and the relative position bias.

Attention treats its keys as a set. That is why a sentence can stay in its natural order here, and
why the network must be told where each token is. MPNet tells it twice.

**Absolute.** Each position has a learned vector, which is added to the token's embedding. Position
p is row `p + pad_token_id + 1` of the table: fairseq counts from the padding id, and the released
weights have this layout. Padding has row `pad_token_id`, which is zero.

**Relative.** Each head adds a learned number to its score for a query at i and a key at j, which
depends only on j - i. In 512 tokens there are 1023 such distances, most of them too rare to learn a
number for each. So T5 sorts them into buckets. Near distances get a bucket each, far ones share,
and keys to the right of the query have buckets of their own:

>>> here, there = torch.arange(5)[:, None], torch.arange(5)[None]  # queries down, keys across
>>> relative_position_bucket(there - here, num_buckets=32, max_distance=128)
tensor([[ 0, 17, 18, 19, 20],
        [ 1,  0, 17, 18, 19],
        [ 2,  1,  0, 17, 18],
        [ 3,  2,  1,  0, 17],
        [ 4,  3,  2,  1,  0]])

In natural order the diagonals are constant, and one bias serves the whole batch. Of the 16 buckets
of one direction, 0 to 7 hold one distance each. After that every second bucket begins at twice the
distance. A mark for each distance up to 127:

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

From `max_distance` (128) on, the formula gives 16 and more, which is cut down to 15. So all
distances of 91 and more look the same, here and in T5 and Hugging Face's MPNet.

Next: `mpnet/local_start.py`, what the table holds before training, and why it matters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annotated_mpnet.mpnet.config import ModelConfig


class LearnedPositionalEmbedding(nn.Embedding):
    """A learned vector for each absolute position, as in the paper.

    With padding id 1, position 0 is row 2 and padding, position -1, is row 1. A table for 512
    positions has 514 rows, which is what Hugging Face's config calls `max_position_embeddings`.
    """

    def __init__(self, max_positions: int, embed_dim: int, pad_token_id: int) -> None:
        super().__init__(max_positions + pad_token_id + 1, embed_dim, padding_idx=pad_token_id)
        self.first_row = pad_token_id + 1

    def forward(self, position_ids_BE: Tensor) -> Tensor:
        """Look up positions (B, E), from 0, and -1 for padding: (B, E, D)."""
        return super().forward(position_ids_BE + self.first_row)


class SinusoidalPositionalEmbedding(nn.Module):
    """Fixed sines and cosines, as fairseq computes them; in no checkpoint.

    Two differences from "Attention Is All You Need": all sines come first and then all cosines, and
    the argument is the row of the table, so position 0 is sin(2) with padding id 1.
    """

    weight: Tensor

    def __init__(self, max_positions: int, embed_dim: int, pad_token_id: int) -> None:
        super().__init__()
        self.first_row = pad_token_id + 1
        half = embed_dim // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / max(half - 1, 1)))
        angles = torch.arange(max_positions + self.first_row)[:, None] * frequencies
        weight = torch.cat([angles.sin(), angles.cos()], dim=1)
        weight = F.pad(weight, (0, embed_dim - 2 * half))  # zeros, if the width is odd
        weight[pad_token_id] = 0
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, position_ids_BE: Tensor) -> Tensor:
        """Look up positions (B, E), from 0, and -1 for padding: (B, E, D)."""
        return F.embedding(position_ids_BE + self.first_row, self.weight)


def relative_position_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Map distances (key position - query position, any shape) to T5's buckets.

    With n buckets in one direction, e = n / 2 of them exact, and a distance d of at least e:

        e + floor((n - e) log(d / e) / log(max_distance / e)), at most n - 1

    The steps, their order and their float32 are those of fairseq and Hugging Face: at the edge of a
    bucket, another rounding of the logarithm would give another bucket.
    """
    one_direction = num_buckets // 2
    exact = one_direction // 2
    magnitude = distance.abs()
    # `where` computes both branches everywhere, so 0 must not become the logarithm of 0.
    growth = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = exact + (growth * (one_direction - exact)).long()
    bucket = torch.where(magnitude < exact, magnitude, shared.clamp(max=one_direction - 1))
    # Keys to the right use the upper half. (Its first bucket, distance 0, is never used.)
    return bucket + one_direction * (distance > 0)


class RelativePositionBias(nn.Embedding):
    """The table of buckets x heads that all layers share.

    Here a head learns how far and to which side it looks, whatever the words.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.relative_attention_num_buckets, config.encoder_attention_heads)
        self.max_distance = config.relative_attention_max_distance

    def for_pairs(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return what is added to the scores, (B or 1, H, Q, M).

        Positions are (B, Q) and (B, M), or (1, Q) and (1, M) if all samples agree.
        """
        distance_BQM = key_positions[:, None, :] - query_positions[:, :, None]
        bucket_BQM = relative_position_bucket(distance_BQM, self.num_embeddings, self.max_distance)
        return self(bucket_BQM).permute(0, 3, 1, 2).contiguous()
