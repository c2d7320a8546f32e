"""Multi-head attention with a relative position bias, over rows that do not all see the same.

For one head, with queries Q, keys K and values V of `head_dim` numbers each:

    attention(Q, K, V) = softmax(Q K^T / sqrt(head_dim) + bias) V

`bias` holds what is learned about relative positions (`positions.py`), and minus infinity where a
row must not see a key (`two_stream.py`). It is added before the softmax, so that it works on the
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
one such row spoils every weight at the next update. `two_stream.py` sees to it. (HF: adds the
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

    The bias may leave out dimensions by having size 1 there, and the kernel repeats it: for the
    sentence's block it is (1, H, L, L), once for the whole batch. Expanding it to (B, H, L, L), as
    Hugging Face's MPNet does, costs 12.6 MB a sample in MPNet-base (12 x 512 x 512 x 4 bytes).

    Attributes:
        rows: which of the rows that ask.
        num_keys: they ask the first `num_keys` keys.
        bias: (B or 1, H or 1, Q or 1, M) in the type of the queries; None adds nothing.
    """

    rows: slice
    num_keys: int
    bias: torch.Tensor | None


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
        D = self.embed_dim
        query_BQD = F.linear(asking_BQD, self.in_proj_weight[:D], self.in_proj_bias[:D])
        key_value_BMG = F.linear(answering_BMD, self.in_proj_weight[D:], self.in_proj_bias[D:])
        query_BHQK = self._split_heads(query_BQD)
        key_BHMK = self._split_heads(key_value_BMG[..., :D])
        value_BHMK = self._split_heads(key_value_BMG[..., D:])

        # The keys of a block are the first so many, so that they are a view and not a copy. The
        # kernel divides by sqrt(head_dim) itself, before it adds the bias: the order matters, since
        # the bias was trained on scores that are scaled already. Outside of training its dropout
        # has to be switched off by hand: it is a function and knows nothing of `eval()`.
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
        # Blocks in order, so that row number r of what was asked is row number r of the answer;
        # the heads side by side again, (B, Q, H, K) to (B, Q, D), and mixed by one last matrix.
        gathered_BQHK = torch.cat(gathered, dim=1)
        return self.out_proj(gathered_BQHK.flatten(2))

    def _split_heads(self, rows_BRD: torch.Tensor) -> torch.Tensor:
        """Go from (B, R, D) to (B, H, R, K): heads beside the batch, because each attends alone."""
        return rows_BRD.view(*rows_BRD.shape[:2], self.num_heads, -1).transpose(1, 2)
