"""Multi-head attention with a relative position bias, over rows that do not all see the same.

For one head, with queries Q, keys K and values V of `head_dim` numbers each:

    attention(Q, K, V) = softmax(Q K^T / sqrt(head_dim) + bias) V

`bias` holds what is learned about relative positions (`mpnet/positions.py`), and minus infinity where a
row must not see a key (`mpnet/two_stream.py`). It is added before the softmax, so that it works on the
*logarithms* of the weights: +log 2 doubles a key's weight against the others', and -inf makes it
exactly zero, whatever the key holds. Take a query of zeros, to which all three keys are alike, and
let the bias be the logarithms of 2, 1 and 0:

>>> query, key = torch.zeros(1, 4), torch.randn(3, 4)
>>> bias = torch.tensor([[2.0, 1.0, 0.0]]).log()
>>> F.softmax(query @ key.T / 4**0.5 + bias, dim=-1)
tensor([[0.6667, 0.3333, 0.0000]])
>>> value = torch.tensor([[3.0], [6.0], [1e9]])
>>> F.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # 2/3 of 3 and 1/3 of 6
tensor([[4.]])

The price of -inf is that each row must see *something*: a softmax over nothing is not a number, and
one such row spoils every weight at the next update. `mpnet/two_stream.py` sees to it. (HF: adds the
smallest number of the type instead; a row that may see nothing then sees everything evenly.)

>>> F.softmax(torch.full((2,), -torch.inf), dim=-1)
tensor([nan, nan])

**Blocks.** An ordinary implementation would put all rows through one such product, under one large
matrix of biases. MPNet's rows come in blocks: the L rows of the masked sentence see the L keys of
the sentence, and only the 2P rows of the staircase see L + P. Cut along this line, the larger block
needs no mask at all and shares one bias with the whole batch, and the corner that no row would see
is never computed. Cutting changes nothing else, since each row's softmax is its own affair:

>>> layer = RelativeMultiHeadAttention(ModelConfig(attention_dropout=0.0))
>>> _ = [nn.init.normal_(weight, std=0.02) for weight in layer.parameters()]
>>> rows_BRD = torch.randn(2, 9, 768)  # L = 5 and P = 2, as in the picture of two_stream.py
>>> upper = BiasedBlock(slice(0, 5), num_keys=5, bias=None)
>>> lower = BiasedBlock(slice(5, 9), num_keys=7, bias=None)
>>> in_blocks_BRD = layer(rows_BRD, rows_BRD[:, :7], (upper, lower))
>>> bias_RM = torch.zeros(9, 7)
>>> bias_RM[:5, 5:] = -torch.inf
>>> whole = BiasedBlock(slice(0, 9), num_keys=7, bias=bias_RM)
>>> torch.allclose(layer(rows_BRD, rows_BRD[:, :7], (whole,)), in_blocks_BRD, atol=1e-6)
True

Everything else in a layer is done for all rows together: one product makes the queries of content,
sentence and query rows alike, one makes keys and values. A few large products keep a processor
busier than many small ones, and the three kinds of rows share their weights anyway.

fairseq: query, key and value weights are one stacked matrix of 3D x D, with these names.
HF: `MPNetSelfAttention` computes the same from three matrices.

**How it is computed.** `attend_eager` is the formula above, a line for each of its steps. What
it costs is memory: for the sentence's block of one row of 512 tokens, the scores of 12 heads are
12.6 MB in float32, and the sum with the bias, the weights and the weights after dropout are as much
again, each. `attend_sdpa` leaves it to PyTorch's `scaled_dot_product_attention`, which takes the
best kernel that can do with what it is given: a fused one goes through the keys piece by piece and
never holds all scores of a row at once. On a CPU there is none that could send a gradient into the
bias, and so it takes the steps of the formula while it trains; `fast/blocked_attention.py` does better
there. `fast/triton_attention.py` is for GPUs, and takes the bias as a rule instead of a matrix.
`--attention` chooses, and the results agree to rounding:

>>> query, key, value = torch.randn(3, 2, 4, 6, 16).unbind()  # 2 sentences, 4 heads, 6 tokens, K 16
>>> bias_1HQM = torch.randn(1, 4, 6, 6)
>>> eager = attend_eager(query, key, value, bias_1HQM, dropout=0.0)
>>> torch.allclose(attend_sdpa(query, key, value, bias_1HQM, dropout=0.0), eager, atol=1e-5)
True

Next: `mpnet/encoder.py`, the layer around it; or how it becomes fast: `mpnet/dropout.py` and
`fast/blocked_attention.py` on a CPU, `fast/triton_attention.py` on a GPU.

    B batch   R rows   Q rows that ask   M keys   D embed_dim   H heads   K head_dim   G 2D
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.fast.blocked_attention import attend_blocked
from annotated_mpnet.fast.triton_attention import BiasRule, attend_triton
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.dropout import dropout as drop


def attend_eager(
    query_BHQK: torch.Tensor,
    key_BHMK: torch.Tensor,
    value_BHMK: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Compute attention as the formula says it.

    Args:
        query_BHQK: (B, H, Q, K), what each row asks for.
        key_BHMK: (B, H, M, K), what each key has to offer.
        value_BHMK: (B, H, M, K), what it gives.
        bias: added to the scores: (B or 1, H or 1, Q or 1, M), or None for nothing.
        dropout: probability that a weight is dropped; 0 outside of training.

    Returns:
        (B, H, Q, K), for each row the mean of the values, weighted by how well the keys answer.
    """
    # How well does each key answer each query? The dot product of K random numbers of size 1 has a
    # spread of sqrt(K); divided by that, the softmax starts neither flat nor at a single key.
    scores_BHQM = query_BHQK @ key_BHMK.transpose(2, 3) / math.sqrt(query_BHQK.shape[3])
    if bias is not None:
        scores_BHQM = scores_BHQM + bias
    # Under autocast the products run in bfloat16, with 8 bits of precision. Sums over all keys are
    # no place for that, and so the softmax runs in float32 (autocast sees to it on a GPU only).
    wide = torch.promote_types(scores_BHQM.dtype, torch.float32)
    weights_BHQM = scores_BHQM.softmax(dim=3, dtype=wide).to(value_BHMK.dtype)
    # Dropout scales the weights that are left, so that on average they still add up to 1.
    return drop(weights_BHQM, dropout) @ value_BHMK


def attend_sdpa(
    query_BHQK: torch.Tensor,
    key_BHMK: torch.Tensor,
    value_BHMK: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Compute what `attend_eager` computes, in the best kernel that PyTorch has for it."""
    # It divides by sqrt(K) before it adds the bias: the order matters, since the bias was trained
    # on scores that are scaled already.
    return F.scaled_dot_product_attention(
        query_BHQK, key_BHMK, value_BHMK, attn_mask=bias, dropout_p=dropout
    )


AttentionName = Literal["eager", "sdpa", "blocked", "triton"]
"""The ways to compute attention that are the user's to choose (`--attention`)."""

ATTENTIONS: dict[AttentionName, Callable[..., torch.Tensor]] = {
    "eager": attend_eager,
    "sdpa": attend_sdpa,
    "blocked": attend_blocked,
    "triton": attend_triton,
}
TAKES_RULES: frozenset[AttentionName] = frozenset({"triton"})
"""Those that are told by a rule what to add to scores; the others want a tensor."""


class BiasedBlock(NamedTuple):
    """A block of rows (`two_stream.Block`), with what is added to its scores.

    The bias may leave out dimensions by having size 1 there, and the kernel repeats it: for the
    sentence's block it is (1, H, L, L), once for the whole batch. Expanding it to (B, H, L, L), as
    Hugging Face's MPNet does, costs 12.6 MB a sample in MPNet-base (12 x 512 x 512 x 4 bytes).

    Attributes:
        rows: which of the rows that ask.
        num_keys: they ask the first `num_keys` keys.
        bias: (B or 1, H or 1, Q or 1, M) in the type of the queries; None adds nothing. Or the rule
            by which a kernel works it out (`TAKES_RULES`).
    """

    rows: slice
    num_keys: int
    bias: torch.Tensor | BiasRule | None


class RelativeMultiHeadAttention(nn.Module):
    """Attention of some rows to others, block by block.

    D x D weights four times, for queries, keys, values and the way out: 2.4 of the 7.1 million of a
    layer of MPNet-base. They are left empty here; `MPNetForPretraining.reset_parameters` draws all
    of the network's weights in one place.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.encoder_attention_heads
        self.embed_dim = config.encoder_embed_dim
        self.dropout = config.attention_dropout
        # How it is computed is no property of the network: it stands in no configuration and in no
        # checkpoint, and may change from one call to the next.
        self.attend: Callable[..., torch.Tensor] = attend_sdpa
        # Rows 0..D-1 make queries, D..2D-1 keys, 2D..3D-1 values: fairseq's order. Each third holds
        # the heads one after the other, `head_dim` rows each.
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
        # Two products, though the weights are stacked, because those who ask and those who answer
        # are different rows. One product for all would make keys of the P query rows, which nobody
        # asks, and in the last layer queries of L + P rows whose answer nobody reads.
        #
        # Split and not sliced, here and below: on the way back the pieces are put together again,
        # where each slice would make a whole of zeros around itself, to be added to the others.
        weights, biases = (
            torch.split(each, [self.embed_dim, 2 * self.embed_dim])
            for each in (self.in_proj_weight, self.in_proj_bias)
        )
        query_BQD = F.linear(asking_BQD, weights[0], biases[0])
        key_value_BMG = F.linear(answering_BMD, weights[1], biases[1])
        query_BHQK = self._split_heads(query_BQD)
        key_BHMK, value_BHMK = (self._split_heads(each) for each in key_value_BMG.chunk(2, dim=2))

        # The keys of a block are the first so many, so that they are a view and not a copy. Outside
        # of training dropout has to be switched off by hand: a function knows nothing of `eval()`.
        sizes = [block.rows.stop - block.rows.start for block in blocks]
        queries = torch.split(query_BHQK, sizes, dim=2)
        gathered = [
            self.attend(
                query,
                key_BHMK[:, :, : block.num_keys],
                value_BHMK[:, :, : block.num_keys],
                bias=block.bias,
                dropout=self.dropout if self.training else 0.0,
            ).transpose(1, 2)
            for query, block in zip(queries, blocks, strict=True)
        ]
        # Blocks in order, so that row number r of what was asked is row number r of the answer;
        # the heads side by side again, (B, Q, H, K) to (B, Q, D), and mixed by one last matrix.
        gathered_BQHK = torch.cat(gathered, dim=1)
        return self.out_proj(gathered_BQHK.flatten(2))

    def _split_heads(self, rows_BRD: torch.Tensor) -> torch.Tensor:
        """Go from (B, R, D) to (B, H, R, K): heads beside the batch, because each attends alone."""
        return rows_BRD.view(*rows_BRD.shape[:2], self.num_heads, -1).transpose(1, 2)
