"""The Transformer around the attention: a layer, and the stack of them.

A layer does two things. Attention mixes information across entries; the feed-forward net transforms
each entry by itself. Both are added to what was there. MPNet normalises the sum (post-norm, as BERT
does):

    hidden = LayerNorm(hidden + attention(hidden))
    hidden = LayerNorm(hidden + feed_forward(hidden))

Pre-norm normalises the input of each part and lets the sum grow:

    hidden = hidden + attention(LayerNorm(hidden))
    hidden = hidden + feed_forward(LayerNorm(hidden))

With pre-norm, fairseq's MPNet does *not* normalise the embeddings, and uses their LayerNorm as the
final norm of the network instead.

The masked sentence, content and queries share all weights. They differ only in what they see.

**Why the last layer is cheaper.** It computes only the entries that make predictions, because
nothing reads what the others would become. In MPNet-base, with 512 tokens and 76 predictions:

    layers 1-11   512 masked sentence + 76 content + 76 queries = 664 attend to 512 + 76 = 588 keys
    layer 12                                         76 queries = 76 attend to 512 + 76 = 588 keys

This saves 6 % of the network's work (`docs/performance.md` has the sums).

**Gradient checkpointing** (Chen, Xu, Zhang, Guestrin: arXiv 1604.06174). The backward pass needs
what the forward pass has computed, and keeping it takes most of the memory of training: 93 MB for
each layer and sample of MPNet-base in float32. With checkpointing a layer keeps its input only, 2
MB, and is computed again in the backward pass. The random generator is restored first, so dropout
drops the same units, and all gradients are the same to the last bit. The price is one more forward
pass, a third of the work.

Next: `mpnet/pretraining.py`, with the head, the initialisation and the loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from annotated_mpnet.mpnet.attention import SDPA, BiasedBlock, RelativeMultiHeadAttention
from annotated_mpnet.mpnet.config import ActivationName, ModelConfig
from annotated_mpnet.mpnet.dropout import Dropout
from annotated_mpnet.mpnet.positions import (
    LearnedPositionalEmbedding,
    RelativePositionBias,
    SinusoidalPositionalEmbedding,
)
from annotated_mpnet.mpnet.two_stream import Block, Entries

ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_accurate": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda values: F.relu(values).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "linear": lambda values: values,
}
"""By fairseq's names: "gelu" is the exact one, by erf, and "gelu_accurate" the approximation."""


class SentenceEncoderLayer(nn.Module):
    """One layer, with fairseq's names: `final_layer_norm` is the layer's second norm."""

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
        self.activation = ACTIVATIONS[config.activation_fn]
        self.pre_norm = config.normalize_before

    def forward(
        self, hidden_BED: Tensor, blocks: tuple[BiasedBlock, ...], wanted_BP: Tensor | None = None
    ) -> Tensor:
        """Run the layer over all entries, or over the wanted ones, which the blocks belong to.

        Returns (B, E, D), or (B, P, D).
        """
        # `source` is what attention reads, normalised with pre-norm; the residual never is.
        source_BED = self.self_attn_layer_norm(hidden_BED) if self.pre_norm else hidden_BED
        query_input_BQD, residual_BQD = source_BED, hidden_BED
        if wanted_BP is not None:
            query_input_BQD = _take_entries(source_BED, wanted_BP)
            residual_BQD = _take_entries(hidden_BED, wanted_BP)

        key_input_BMD = source_BED[:, : blocks[-1].num_keys]
        attended_BQD = self.self_attn(query_input_BQD, key_input_BMD, blocks)
        hidden_BQD = residual_BQD + self.dropout(attended_BQD)
        if self.pre_norm:
            return hidden_BQD + self._feed_forward(self.final_layer_norm(hidden_BQD))
        hidden_BQD = self.self_attn_layer_norm(hidden_BQD)
        return self.final_layer_norm(hidden_BQD + self._feed_forward(hidden_BQD))

    def _feed_forward(self, hidden_BQD: Tensor) -> Tensor:
        inner_BQF = self.activation_dropout(self.activation(self.fc1(hidden_BQD)))
        return self.dropout(self.fc2(inner_BQF))


class SentenceEncoder(nn.Module):
    """Embeddings, the layers, and the relative position bias that they share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embed_dim, padding = config.encoder_embed_dim, config.pad_token_id
        learned = config.position_embedding == "learned"
        positions = LearnedPositionalEmbedding if learned else SinusoidalPositionalEmbedding
        self.embed_tokens = nn.Embedding(config.vocab_size, embed_dim, padding_idx=padding)
        self.embed_positions = positions(config.max_positions, embed_dim, padding)
        self.emb_layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.relative_attention_bias = (
            RelativePositionBias(config) if config.relative_attention_num_buckets else None
        )
        self.layers = nn.ModuleList(
            SentenceEncoderLayer(config) for _ in range(config.encoder_layers)
        )
        # How the network is computed, not what it is: in no checkpoint, free to change.
        self.make_bias = SDPA.make_bias
        self.recompute_layers = False

    def forward(self, entries: Entries) -> Tensor:
        """Return the entries that make predictions (B, P, D), or all entries (B, E, D)."""
        embedded_BED = self.embed_tokens(entries.input_ids)
        hidden_BED = embedded_BED + self.embed_positions(entries.position_ids)
        if not self.config.normalize_before:
            hidden_BED = self.emb_layer_norm(hidden_BED)
        hidden_BED = self.dropout(hidden_BED)

        # All layers share one bias, so it is built once, before the first of them.
        blocks = tuple(self._with_bias(block, hidden_BED) for block in entries.blocks)
        last_blocks = blocks
        if entries.loss_entries is not None:
            last_blocks = (self._with_bias(entries.last_block, hidden_BED),)
        for layer in self.layers[:-1]:
            hidden_BED = self._run(layer, hidden_BED, blocks)
        hidden_BQD = self._run(self.layers[-1], hidden_BED, last_blocks, entries.loss_entries)
        return self.emb_layer_norm(hidden_BQD) if self.config.normalize_before else hidden_BQD

    def _with_bias(self, block: Block, hidden_BED: Tensor) -> BiasedBlock:
        bias = self.make_bias(block, self.relative_attention_bias, hidden_BED)
        return BiasedBlock(block.query_positions.shape[1], block.key_positions.shape[1], bias)

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if not self.recompute_layers:
            return layer(*inputs)
        # PyTorch's older, reentrant way computes no gradient if no input requires one.
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=True)


def _take_entries(hidden_BED: Tensor, wanted_BP: Tensor) -> Tensor:
    """Return the wanted entries of each sample, (B, P, D). In `mlm` mode they can be anywhere."""
    return hidden_BED.gather(1, wanted_BP[:, :, None].expand(-1, -1, hidden_BED.shape[2]))
