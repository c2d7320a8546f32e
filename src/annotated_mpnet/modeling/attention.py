"""Multi-head attention with a relative position bias, over rows that do not all see the same.

For one head, with queries Q, keys K and values V of `head_dim` numbers each:

    attention(Q, K, V) = softmax(Q K^T / sqrt(head_dim) + bias) V

`bias` holds what is learned about relative positions (`positions.py`), and minus infinity where a
row must not see a key (`two_stream.py`): exp(-inf) is a weight of exactly zero.

An ordinary implementation would put all rows through one such product, under one large matrix of
biases. MPNet's rows come in blocks: the L rows of the masked sentence see the L keys of the
sentence, and only the 2P rows of the staircase see L + P. Cut along this line, the larger block
needs no mask at all and shares one bias with the whole batch, and the corner that no row would see
is never computed. Everything else in a layer is done for all rows together: one product makes the
queries of content, sentence and query rows alike, one makes keys and values.

fairseq: query, key and value weights are one stacked matrix of 3D x D, with these names.
HF: `MPNetSelfAttention` computes the same from three matrices, but has no fused attention; here
PyTorch's `scaled_dot_product_attention` picks the best kernel that can take a bias.

Next: `encoder.py`, the layer around it.

    B batch   R rows   Q rows that ask   M keys   D embed_dim   H heads   K head_dim   G 2D
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.config import ModelConfig


class BiasedBlock(NamedTuple):
    """A block of rows (`two_stream.Block`), with what is added to its scores.

    Attributes:
        rows: which of the rows that ask.
        num_keys: they ask the first `num_keys` keys.
        bias: (B or 1, H or 1, Q or 1, M) in the type of the queries; None adds nothing.
    """

    rows: slice
    num_keys: int
    bias: torch.Tensor | None


class RelativeMultiHeadAttention(nn.Module):
    """Attention of some rows to others, block by block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.encoder_attention_heads
        self.embed_dim = config.encoder_embed_dim
        self.dropout = config.attention_dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * self.embed_dim, self.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * self.embed_dim))
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(
        self,
        asking_BQD: torch.Tensor,
        answering_BMD: torch.Tensor,
        blocks: tuple[BiasedBlock, ...],
    ) -> torch.Tensor:
        """Let rows ask rows.

        Args:
            asking_BQD: (B, Q, D), the rows that want to know.
            answering_BMD: (B, M, D), the rows that give keys and values, often among the former.
            blocks: which of the rows ask which keys; together they cover all Q rows, in order.

        Returns:
            (B, Q, D), for each row what it gathered.
        """
        D = self.embed_dim
        query_BQD = F.linear(asking_BQD, self.in_proj_weight[:D], self.in_proj_bias[:D])
        key_value_BMG = F.linear(answering_BMD, self.in_proj_weight[D:], self.in_proj_bias[D:])
        query_BHQK = self._split_heads(query_BQD)
        key_BHMK = self._split_heads(key_value_BMG[..., :D])
        value_BHMK = self._split_heads(key_value_BMG[..., D:])
        gathered = [
            F.scaled_dot_product_attention(
                query_BHQK[:, :, block.rows],
                key_BHMK[:, :, : block.num_keys],
                value_BHMK[:, :, : block.num_keys],
                attn_mask=block.bias,
                dropout_p=self.dropout if self.training else 0.0,
            ).transpose(1, 2)
            for block in blocks
        ]
        gathered_BQHK = torch.cat(gathered, dim=1)
        return self.out_proj(gathered_BQHK.flatten(2))

    def _split_heads(self, rows_BRD: torch.Tensor) -> torch.Tensor:
        return rows_BRD.view(*rows_BRD.shape[:2], self.num_heads, -1).transpose(1, 2)
