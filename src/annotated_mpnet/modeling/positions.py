"""Where a token stands: absolute positions, and the relative position bias.

Attention by itself does not care in which order it meets its keys: permute them, and the result is
the same. That is what lets this project leave a sentence in its natural order while MPNet speaks of
permutations (`two_stream.py`); and it is why positions must be told explicitly. MPNet tells them
twice.

**Absolute.** Each position owns a vector that is added to the token's embedding. Position p of a
sentence uses row `p + pad_token_id + 1` of the table, so that rows 0 and 1 stay unused with MPNet's
padding id 1: fairseq counts positions from behind the padding id, and the released weights are laid
out so. Padding itself uses row `pad_token_id`, which is all zero.

**Relative.** Every head adds a learned number to its score for a pair (query at i, key at j), which
depends on j - i alone. A number for each distance would be too many to learn, so that T5 puts
distances into buckets: near ones get a bucket each, far ones share, ever more of them, and the keys
to the right of the query use buckets of their own:

>>> distances = torch.tensor([-200, -91, -90, -20, -8, -7, -1, 0, 1, 7, 8, 20, 90, 91, 200])
>>> relative_position_bucket(distances, num_buckets=32, max_distance=128).tolist()
[15, 15, 14, 10, 8, 7, 1, 0, 17, 23, 24, 26, 30, 31, 31]

Of the 16 buckets of one direction, 0..7 are exact; from there on a bucket grows with the logarithm
of the distance. The last one should begin at 128, `max_distance`, but rounding down lets it begin
at 91: beyond that, all distances look the same, in T5, in MPNet, and in Hugging Face's MPNet.

MPNet differs from T5 in one thing: a single table of buckets x heads serves all the layers.

Next: `attention.py` adds the bias to the scores.

    B batch   L tokens of a sentence   D embed_dim   H heads   Q rows that ask   M keys
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.config import ModelConfig


class LearnedPositionalEmbedding(nn.Embedding):
    """A learned vector for each absolute position (the paper's choice)."""

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
    """

    weight: torch.Tensor

    def __init__(self, max_positions: int, embed_dim: int, pad_token_id: int) -> None:
        super().__init__()
        self.first_row = pad_token_id + 1
        half = embed_dim // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / max(half - 1, 1)))
        angles = torch.arange(max_positions + self.first_row)[:, None] * frequencies
        weight = torch.cat([angles.sin(), angles.cos()], dim=1)
        weight = F.pad(weight, (0, embed_dim - 2 * half))  # an odd width gets a column of zeros
        weight[pad_token_id] = 0
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, positions_BR: torch.Tensor) -> torch.Tensor:
        """Look up positions (B, R), counted from 0, and -1 for padding: (B, R, D)."""
        return F.embedding(positions_BR + self.first_row, self.weight)


def build_position_embedding(config: ModelConfig) -> nn.Module:
    """Return the absolute positions that the configuration asks for."""
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
    edge of a bucket another rounding of the logarithm would give another bucket.
    """
    one_direction = num_buckets // 2
    exact = one_direction // 2
    magnitude = distance.abs()
    # log(0) is -inf, which no integer can hold; that branch is not chosen there, but must be
    # finite.
    growth = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = exact + (growth * (one_direction - exact)).long()
    bucket = torch.where(magnitude < exact, magnitude, shared.clamp(max=one_direction - 1))
    return bucket + one_direction * (distance > 0)


class RelativePositionBias(nn.Embedding):
    """The table of buckets x heads that all layers share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.relative_attention_num_buckets, config.encoder_attention_heads)
        self.max_distance = config.relative_attention_max_distance

    def for_pairs(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Return what is added to each head's scores of all pairs of a query and a key.

        Args:
            query_positions: (B, Q), or (1, Q) when it is the same for the whole batch.
            key_positions: (B, M) or (1, M).

        Returns:
            (B, H, Q, M) or (1, H, Q, M).
        """
        distance_BQM = key_positions[:, None, :] - query_positions[:, :, None]
        bucket_BQM = relative_position_bucket(distance_BQM, self.num_embeddings, self.max_distance)
        return self(bucket_BQM).permute(0, 3, 1, 2).contiguous()
