"""The Transformer around the attention: a layer, and the stack of them.

A layer does two things to each row: it lets it gather from other rows, and it thinks about what it
gathered. Both are added to what the row was. MPNet normalises the sum (post-norm, as BERT does):

    hidden = LayerNorm(hidden + attention(hidden))
    hidden = LayerNorm(hidden + feed_forward(hidden))

Pre-norm normalises what goes into each part and lets the sum grow:

    hidden = hidden + attention(LayerNorm(hidden))
    hidden = hidden + feed_forward(LayerNorm(hidden))

fairseq's MPNet has a peculiarity there, which its weights depend on: the input is then *not*
normalised, and the LayerNorm of the embeddings serves at the other end, as the final norm.

All rows take the same way, whatever their role: the difference between the masked sentence, content
and query rows lies in whom they see, and in nothing else. That is also why `encode`, which
fine-tuning will use, is this very code with the masked sentence's block alone.

**Entries from layer to layer**, in MPNet-base with 512 tokens, of which 76 are predicted:

    layers 1-11   512 masked sentence + 76 content + 76 query = 664 ask   512 + 76 = 588 answer
    layer 12                                         76 query = 76 ask    512 + 76 = 588 answer

**The last layer** computes only the rows at which the loss is read. Everybody's keys and values
are still needed there, but nobody will look at what the other rows become. So one layer costs a
quarter of the others, without changing the result. In GFLOP, as PyTorch counts them (on
the "meta" device, whose tensors have shapes and no contents; a multiplication and an addition are
two operations):

>>> def gflop(wanted_BP, *blocks):
...     with FlopCounterMode(display=False) as counter, torch.no_grad():
...         layer(hidden_BRD, 588, blocks, wanted_BP)
...     return round(counter.get_total_flops() / 1e9, 2)
>>> from torch.utils.flop_counter import FlopCounterMode
>>> with torch.device("meta"):
...     layer = SentenceEncoderLayer(ModelConfig()).eval()
...     hidden_BRD, queries_BP = torch.empty(1, 664, 768), torch.empty(1, 76, dtype=torch.long)
>>> dense = BiasedBlock(slice(0, 512), 512, None)
>>> staircase, last = (BiasedBlock(rows, 588, None) for rows in (slice(512, 664), slice(0, 76)))
>>> gflop(None, dense, staircase), gflop(queries_BP, last)
(10.3, 2.42)

The head, for 76 rows, takes another 3.65 (`mpnet/pretraining.py`). A forward pass is then 11 x 10.30 +
2.42 + 3.65 = 119.4 GFLOP, where 12 equal layers would make it 127.3: 6 % are saved, and as much of
the way back. Where do 10.30 come from? 2 D D for each row and D x D matrix, 4 D for each score (D
numbers multiplied and added to make it, and again to use it):

>>> L, P, D, ffn_dim = 512, 76, 768, 3072
>>> projections = 2 * D * D * (2 * (L + 2 * P) + 2 * (L + P))  # queries, way out; keys, values
>>> scores = 4 * D * (L * L + 2 * P * (L + P))
>>> feed_forward = 2 * 2 * D * ffn_dim * (L + 2 * P)
>>> [round(flop / 1e9, 2) for flop in (projections, scores, feed_forward)]
[2.95, 1.08, 6.27]

Three fifths are the feed-forward part, whose 664 rows are 30 % more than BERT's 512. That, and not
attention, is most of what MPNet costs over BERT, which is

>>> round((2 * D * D * 4 * L + 4 * D * L * L + 2 * 2 * D * ffn_dim * L) / 1e9, 2)
8.05

**Computing a layer twice.** The way back needs what the way there has computed: queries, keys and
values, the weights of attention, the wide rows before and behind the non-linearity, and which units
dropout has dropped. All this is kept until the backward pass comes by, and is most of the memory
that training takes; weights and optimizer do not grow with the batch. For a single sentence of 512
tokens, the layer above keeps, in MB:

>>> from annotated_mpnet.mpnet.attention import attend_eager
>>> kept = {}  # by storage, so that no tensor is counted twice
>>> def keep(tensor):
...     kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
...     return tensor
>>> with torch.device("meta"):
...     dense, staircase = dense._replace(bias=torch.empty(1, 12, 512, 512)), staircase._replace(
...         bias=torch.empty(1, 12, 152, 588))
>>> layer.self_attn.attend = attend_eager
>>> with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
...     _ = layer.train()(hidden_BRD, 588, (dense, staircase))
>>> for own in (hidden_BRD, *layer.parameters()):  # they are there anyway
...     _ = kept.pop(own.untyped_storage()._cdata, None)
>>> f"{sum(kept.values()) / 1e6:.1f}, for an input of {hidden_BRD.nbytes / 1e6:.1f}"
'93.0, for an input of 2.0'

Twelve layers and 16 sentences make 17.9 GB. *Gradient checkpointing* (Chen, Xu, Zhang, Guestrin:
"Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174) keeps each layer's input only,
0.4 GB for all of them, and when the way back arrives at a layer, computes it once more from there:
1.5 GB, of one layer at a time. The random generator is put back to where it stood, so that dropout
drops the same units, and the gradients are the same to the last bit. The price is the layers'
forward pass once more, a third of their work: a backward pass is worth two forward passes, because
each product has two factors to send a gradient to.

Next: `mpnet/pretraining.py`, with the head, the initialisation and the loss.

    B batch   R rows   M keys   Q rows that ask   P predicted tokens   D embed_dim   H heads
    F feed-forward dim
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from annotated_mpnet.fast.triton_attention import BiasRule
from annotated_mpnet.mpnet.attention import BiasedBlock, RelativeMultiHeadAttention
from annotated_mpnet.mpnet.config import ActivationName, ModelConfig
from annotated_mpnet.mpnet.dropout import Dropout
from annotated_mpnet.mpnet.positions import RelativePositionBias, build_position_embedding
from annotated_mpnet.mpnet.two_stream import Block, Entries

LayerInput = torch.Tensor | int | tuple[BiasedBlock, ...] | None
"""What a layer is called with: the arguments of `SentenceEncoderLayer.forward`."""

ACTIVATIONS: dict[ActivationName, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_accurate": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda values: F.relu(values).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "linear": lambda values: values,
}


def activate(name: ActivationName, values: torch.Tensor) -> torch.Tensor:
    """Apply a non-linearity by its fairseq name, to values of any shape.

    fairseq: "gelu" is the exact one, by erf, and "gelu_accurate", in spite of its name, the
    approximation by tanh. They differ in the fourth digit: little, but to continue from weights
    that were trained with the other one is a change of the network.

    >>> at = torch.tensor([-1.0, 2.0])
    >>> for name in ACTIVATIONS:
    ...     print(f"{name:14}", *(f"{value:7.4f}" for value in activate(name, at)))
    gelu           -0.1587  1.9545
    gelu_accurate  -0.1588  1.9546
    relu            0.0000  2.0000
    relu2           0.0000  4.0000
    silu           -0.2689  1.7616
    tanh           -0.7616  0.9640
    linear         -1.0000  2.0000
    """
    return ACTIVATIONS[name](values)


class SentenceEncoderLayer(nn.Module):
    """One Transformer layer: attention, then the feed-forward part, each with its sum and norm.

    12 D^2 weights, but for biases and norms: 4 D^2 in the attention, 8 D^2 in `fc1` and `fc2`,
    which widen a row to F = 4 D, bend it, and bring it back. The names are fairseq's; its
    `final_layer_norm` is the layer's second norm, not the network's last.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        embed_dim, ffn_dim = config.encoder_embed_dim, config.encoder_ffn_dim
        self.self_attn = RelativeMultiHeadAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)
        self.activation_fn: ActivationName = config.activation_fn
        self.pre_norm = config.normalize_before

    def forward(
        self,
        hidden_BRD: torch.Tensor,
        num_keys: int,
        blocks: tuple[BiasedBlock, ...],
        wanted_BP: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden_BRD: (B, R, D), all rows; the first `num_keys` of them answer.
            num_keys: M.
            blocks: who sees whom, for the rows that are computed.
            wanted_BP: (B, P), the rows that are to be computed; None for all.

        Returns:
            (B, R, D), or (B, P, D).
        """
        # Three roles of the rows, which pre-norm and the last layer tell apart. `source`: what
        # attention reads, normalised or not. `asking`: those of it that are computed. `residual`:
        # what they were before, never normalised, to which the results are added.
        source_BRD = self.self_attn_layer_norm(hidden_BRD) if self.pre_norm else hidden_BRD
        asking_BQD, residual_BQD = source_BRD, hidden_BRD
        if wanted_BP is not None:
            asking_BQD = _take_rows(source_BRD, wanted_BP)
            residual_BQD = _take_rows(hidden_BRD, wanted_BP)

        # Dropout acts on what is added, not on the sum: dropping a part of the sum would drop the
        # row's own past along with it.
        gathered_BQD = self.self_attn(asking_BQD, source_BRD[:, :num_keys], blocks)
        hidden_BQD = residual_BQD + self.dropout(gathered_BQD)
        if self.pre_norm:
            thought_BQD = self._feed_forward(self.final_layer_norm(hidden_BQD))
            return hidden_BQD + thought_BQD

        # Post-norm: what the feed-forward part reads is also what its result is added to.
        hidden_BQD = self.self_attn_layer_norm(hidden_BQD)
        thought_BQD = self._feed_forward(hidden_BQD)
        return self.final_layer_norm(hidden_BQD + thought_BQD)

    def _feed_forward(self, hidden_BQD: torch.Tensor) -> torch.Tensor:
        """Go from (B, Q, D) to (B, Q, F) and back: each row by itself, its neighbours unseen."""
        inner_BQF = self.activation_dropout(activate(self.activation_fn, self.fc1(hidden_BQD)))
        return self.dropout(self.fc2(inner_BQF))


class SentenceEncoder(nn.Module):
    """Embeddings, the layers, and the one relative position bias that they share.

    It takes `Entries` and knows no objective: which rows there are, and who sees whom, has been
    settled in `mpnet/two_stream.py`. `MPNetForPretraining.encode` passes it the sentence alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embed_dim = config.encoder_embed_dim
        self.embed_tokens = nn.Embedding(
            config.vocab_size, embed_dim, padding_idx=config.pad_token_id
        )
        self.embed_positions = build_position_embedding(config)
        self.emb_layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.relative_attention_bias = (
            RelativePositionBias(config) if config.relative_attention_num_buckets else None
        )
        self.layers = nn.ModuleList(
            SentenceEncoderLayer(config) for _ in range(config.encoder_layers)
        )
        # Gradient checkpointing: a matter of memory and time, not of the network, and so neither in
        # the configuration nor in a checkpoint. It may change from one call to the next.
        self.recompute_layers = False
        # So is how attention is computed: some ways take the bias as a rule, most as a tensor.
        self.bias_as_rule = False

    def forward(self, rows: Entries) -> torch.Tensor:
        """Run rows through the network.

        Returns:
            (B, P, D), what the loss rows became; (B, R, D) where all rows are wanted.
        """
        # A query and the masked sentence's row of the same place start as the same vector (same
        # stand-in, same position), and part in the first layer, because they see different keys.
        hidden_BRD = self.embed_tokens(rows.input_ids) + self.embed_positions(rows.positions)
        if not self.config.normalize_before:
            hidden_BRD = self.emb_layer_norm(hidden_BRD)
        hidden_BRD = self.dropout(hidden_BRD)

        # All layers share one bias, so that it is built once, before the first of them. In float32
        # and MPNet-base that is 12.6 MB for the whole batch and 4.3 MB for each of its samples (12
        # heads, 152 rows of the staircase, 588 keys). HF: once too, but expanded for each sample.
        blocks = tuple(self._with_bias(block, hidden_BRD) for block in rows.blocks)
        last_blocks = blocks
        if rows.loss_entries is not None:
            last_blocks = (self._with_bias(rows.last_block, hidden_BRD),)

        # Until the last layer every row goes on: the sentence and content because the next layer
        # asks them, the queries because they are what the loss will read.
        for layer in self.layers[:-1]:
            hidden_BRD = self._run(layer, hidden_BRD, rows.num_keys, blocks)
        hidden_BQD = self._run(
            self.layers[-1], hidden_BRD, rows.num_keys, last_blocks, rows.loss_entries
        )
        if self.config.normalize_before:
            hidden_BQD = self.emb_layer_norm(hidden_BQD)
        return hidden_BQD

    def _run(self, layer: nn.Module, *inputs: LayerInput) -> torch.Tensor:
        """Run a layer, and keep what its backward pass needs, or only its inputs."""
        if not self.recompute_layers:
            return layer(*inputs)
        # The two keywords: PyTorch's older way (reentrant) runs a backward pass within the backward
        # pass, and computes nothing at all where no input asks for a gradient; and the state of the
        # random generators is put back before a layer runs again.
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=True)

    def _with_bias(self, block: Block, hidden_BRD: torch.Tensor) -> BiasedBlock:
        """Turn positions and visibility into what is added to scores: one tensor, or None.

        The learned part comes first, (B or 1, H, Q, M); then -inf is written over it where a row
        must not see, the same for all heads. Written over and not added: a hidden pair then sends
        no gradient into the table, which should learn from what was seen.

        Or into the rule itself, for a kernel that works out both parts for each pair that it meets.
        """
        num_keys = block.key_positions.shape[1]
        if self.bias_as_rule:
            rule = BiasRule.of(block, self.relative_attention_bias, len(hidden_BRD))
            return BiasedBlock(block.rows, num_keys, rule)
        bias: torch.Tensor | None = None
        visible_BQM = block.visible
        if self.relative_attention_bias is not None:
            bias = self.relative_attention_bias.for_pairs(
                block.query_positions, block.key_positions
            )
        elif visible_BQM is not None:
            # No learned bias to write -inf over: a single zero, which spreads to (B, 1, Q, M).
            bias = hidden_BRD.new_zeros(())
        if bias is not None:
            if visible_BQM is not None:
                bias = bias.masked_fill(~visible_BQM[:, None], float("-inf"))
            bias = bias.to(_compute_dtype(hidden_BRD))
        return BiasedBlock(block.rows, num_keys, bias)


def _take_rows(hidden_BRD: torch.Tensor, wanted_BP: torch.Tensor) -> torch.Tensor:
    """Return rows by their number, each sample its own: (B, R, D) at (B, P) gives (B, P, D).

    In `mpnet` and `plm` mode the wanted rows are simply the last P, but in `mlm` they lie anywhere
    in the sentence, and otherwise in each sample; one way serves all.

    >>> _take_rows(torch.arange(6.0).view(2, 3, 1), torch.tensor([[2, 0], [1, 1]])).flatten(1)
    tensor([[2., 0.],
            [4., 4.]])
    """
    return hidden_BRD.gather(1, wanted_BP[:, :, None].expand(-1, -1, hidden_BRD.shape[2]))


def _compute_dtype(hidden_BRD: torch.Tensor) -> torch.dtype:
    """Return the type in which attention will run: autocast's, where it is on.

    The bias has to be of that type, because the kernels mix no types. The scores are computed by a
    matrix product, which autocast runs in bfloat16; the bias comes out of a table in float32. Cast
    here, it is cast once and not in each layer. (-inf is -inf in every type.)
    """
    device_type = hidden_BRD.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_BRD.dtype
