"""Multi-head attention with a relative position bias, block by block.

For one head, with queries Q, keys K and values V of `head_dim` numbers each:

    attention(Q, K, V) = softmax(Q K^T / sqrt(head_dim) + bias) V

`bias` holds what is learned about relative positions (`mpnet/positions.py`), and minus infinity
where a query must not see a key (`mpnet/two_stream.py`). It is added before the softmax, so it acts
on the *logarithms* of the weights: + log 2 doubles a key's weight against the others, and -inf
makes it zero. Take a query that likes all three keys equally, and biases of log 2, log 1 and log 0:

>>> query, key = torch.zeros(1, 1, 1, 4), torch.randn(1, 1, 3, 4)
>>> value = torch.tensor([[[[3.0], [6.0], [1e9]]]])
>>> bias = torch.tensor([2.0, 1.0, 0.0]).log()
>>> attend_eager(query, key, value, bias, dropout=0.0).item()  # 2/3 of 3 and 1/3 of 6
4.0

Every query must see *something*: a softmax over nothing is NaN, and one NaN spoils all weights.

**Blocks.** The L entries of the masked sentence see its L keys, the other 2P entries see L + P. In
two blocks, the larger one needs no mask, has one bias for the whole batch, and skips the keys that
it would not see. The result is that of one product with one large matrix of biases, because the
softmax of a query does not depend on other queries:

>>> layer = RelativeMultiHeadAttention(ModelConfig(attention_dropout=0.0))
>>> _ = [nn.init.normal_(weight, std=0.02) for weight in layer.parameters()]
>>> hidden_BED = torch.randn(2, 9, 768)  # L = 5 and P = 2, as in the picture of two_stream.py
>>> two = BiasedBlock(5, 5, bias=None), BiasedBlock(4, 7, bias=None)
>>> bias_EM = torch.zeros(9, 7)
>>> bias_EM[:5, 5:] = -torch.inf
>>> one = (BiasedBlock(9, 7, bias_EM),)
>>> torch.allclose(*(layer(hidden_BED, hidden_BED[:, :7], each) for each in (one, two)), atol=1e-6)
True

**Ways to compute it.** `EAGER` is the formula, step by step. `SDPA` is PyTorch's
`scaled_dot_product_attention`, which takes the best kernel for its inputs. Faster ways for CPUs and
GPUs are in `fast/`. `model.use_attention` takes any of them, and all agree to rounding.

Next: `mpnet/encoder.py`, the layer around the attention.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.dropout import dropout as drop
from annotated_mpnet.mpnet.positions import RelativePositionBias
from annotated_mpnet.mpnet.two_stream import Block


def attend_eager(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None, dropout: float
) -> Tensor:
    """Compute attention as in the formula; return (B, H, Q, K).

    The bias is (B or 1, H or 1, Q or 1, M), or None; dropout is 0 outside of training.
    """
    # The dot product of K random numbers of size 1 has a standard deviation of sqrt(K).
    scores_BHQM = query_BHQK @ key_BHMK.transpose(2, 3) / math.sqrt(query_BHQK.shape[3])
    if bias is not None:
        scores_BHQM = scores_BHQM + bias
    # Under autocast the products are in bfloat16, which is too coarse for a sum over all keys.
    wide = torch.promote_types(scores_BHQM.dtype, torch.float32)
    weights_BHQM = scores_BHQM.softmax(dim=3, dtype=wide).to(value_BHMK.dtype)
    return drop(weights_BHQM, dropout) @ value_BHMK


def attend_sdpa(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None, dropout: float
) -> Tensor:
    """Compute the same in PyTorch's best kernel for it."""
    return F.scaled_dot_product_attention(
        query_BHQK, key_BHMK, value_BHMK, attn_mask=bias, dropout_p=dropout
    )


def bias_matrix(block: Block, table: RelativePositionBias | None, hidden: Tensor) -> Tensor | None:
    """Return what is added to the scores of a block, or None.

    The learned bias, (B or 1, H, Q, M), with -inf where a query must not see a key. -inf replaces
    the bias and is not added to it, so hidden pairs send no gradient into the table. The hidden
    states are there for their type and device.
    """
    if table is not None:
        bias = table.for_pairs(block.query_positions, block.key_positions)
    elif block.visibility is not None:
        bias = hidden.new_zeros(())
    else:
        return None
    if block.visibility is not None:
        bias = bias.masked_fill(~block.visibility.matrix()[:, None], float("-inf"))
    # The bias must have the type of the scores. Cast here, it is cast once for all layers.
    device = bias.device.type
    autocast = torch.is_autocast_enabled(device)
    return bias.to(torch.get_autocast_dtype(device) if autocast else hidden.dtype)


class BiasedBlock(NamedTuple):
    """The next `num_queries` queries, which attend to the first `num_keys` keys.

    `bias` may have size 1 in a dimension: the masked sentence's is (1, H, L, L) for the batch.
    """

    num_queries: int
    num_keys: int
    bias: Any


def attend_blocks(
    attend: Callable[..., Tensor],
    query_BHQK: Tensor,
    key_BHMK: Tensor,
    value_BHMK: Tensor,
    blocks: tuple[BiasedBlock, ...],
    dropout: float,
) -> Tensor:
    """Compute one block after the other, each as `attend_eager` does; return (B, Q, H, K)."""
    queries = torch.split(query_BHQK, [block.num_queries for block in blocks], dim=2)
    attended = [
        attend(
            query,
            key_BHMK[:, :, : block.num_keys],
            value_BHMK[:, :, : block.num_keys],
            bias=block.bias,
            dropout=dropout,
        ).transpose(1, 2)
        for query, block in zip(queries, blocks, strict=True)
    ]
    return torch.cat(attended, dim=1)


class Attention(NamedTuple):
    """A way to compute attention.

    Attributes:
        attend: called as `attend_blocks` is, without its first argument.
        make_bias: called as `bias_matrix` is; what it returns goes to `attend`.
    """

    attend: Callable[..., Tensor]
    make_bias: Callable[[Block, RelativePositionBias | None, Tensor], Any] = bias_matrix


EAGER = Attention(partial(attend_blocks, attend_eager))
SDPA = Attention(partial(attend_blocks, attend_sdpa))


class RelativeMultiHeadAttention(nn.Module):
    """Attention of some entries to others; `MPNetForPretraining` initialises the weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.encoder_attention_heads
        self.embed_dim = config.encoder_embed_dim
        self.dropout = config.attention_dropout
        # Not a property of the network: in no configuration, in no checkpoint, free to change.
        self.attend = SDPA.attend
        # fairseq's layout: D rows each for queries, keys and values, `head_dim` of them per head.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * self.embed_dim, self.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * self.embed_dim))
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(
        self, query_input_BQD: Tensor, key_input_BMD: Tensor, blocks: tuple[BiasedBlock, ...]
    ) -> Tensor:
        """Let entries (B, Q, D) attend to entries (B, M, D); return (B, Q, D).

        The blocks say which queries attend to which keys, and cover all queries, in order.
        """
        # Two products, because not all entries need both: the query stream gives no keys, and in
        # the last layer only the query stream attends. Split instead of sliced: in the backward
        # pass each slice would fill a tensor of zeros.
        weights, biases = (
            torch.split(each, [self.embed_dim, 2 * self.embed_dim])
            for each in (self.in_proj_weight, self.in_proj_bias)
        )
        query_BHQK = self._split_heads(F.linear(query_input_BQD, weights[0], biases[0]))
        key_value = F.linear(key_input_BMD, weights[1], biases[1])
        key_BHMK, value_BHMK = (self._split_heads(each) for each in key_value.chunk(2, dim=2))

        dropout = self.dropout if self.training else 0.0
        attended_BQHK = self.attend(query_BHQK, key_BHMK, value_BHMK, blocks, dropout)
        # The heads side by side again, and mixed by one last matrix.
        return self.out_proj(attended_BQHK.flatten(2))

    def _split_heads(self, projected: Tensor) -> Tensor:
        """Go from (B, Q, D) to (B, H, Q, K): each head attends alone, like another sample."""
        return projected.view(*projected.shape[:2], self.num_heads, -1).transpose(1, 2)
