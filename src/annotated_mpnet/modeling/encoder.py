"""The Transformer around the attention: a layer, and the stack of them.

A layer does two things to each row: it lets it gather from other rows, and it thinks about what it
gathered. Both are added to what the row was. MPNet normalises the sum (post-norm, as BERT does):

    hidden = LayerNorm(hidden + attention(hidden))
    hidden = LayerNorm(hidden + feed_forward(hidden))

Pre-norm normalises what goes into each part and lets the sum grow. fairseq's MPNet has a
peculiarity there, which its weights depend on: the input is then *not* normalised, and the
LayerNorm of the embeddings serves at the other end, as the final norm.

All rows take the same way, whatever their role: the difference between the masked sentence, content
and query rows lies in whom they see, and in nothing else. That is also why `encode`, which
fine-tuning will use, is this very code with the masked sentence's block alone.

**The last layer** computes only the rows at which the loss is read. Everybody's keys and values
are still needed there, but nobody will look at what the other rows become: with 12 layers and P =
0.15 L that saves about 6 % of a forward pass, without changing a bit of the result.

Next: `pretraining.py`, with the head, the initialisation and the loss.

    B batch   R rows   M keys   Q rows that ask   P predicted tokens   D embed_dim   H heads
    F feed-forward dim
"""

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.config import ActivationName, ModelConfig
from annotated_mpnet.modeling.attention import BiasedBlock, RelativeMultiHeadAttention
from annotated_mpnet.modeling.positions import RelativePositionBias, build_position_embedding
from annotated_mpnet.modeling.two_stream import Block, Rows


def activate(name: ActivationName, values: torch.Tensor) -> torch.Tensor:
    """Apply a non-linearity by its fairseq name, to values of any shape."""
    match name:
        case "gelu":
            return F.gelu(values)
        case "gelu_accurate":
            return F.gelu(values, approximate="tanh")
        case "relu":
            return F.relu(values)
        case "relu2":
            return F.relu(values).square()
        case "silu":
            return F.silu(values)
        case "tanh":
            return torch.tanh(values)
        case "linear":
            return values


class SentenceEncoderLayer(nn.Module):
    """One Transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        embed_dim, ffn_dim = config.encoder_embed_dim, config.encoder_ffn_dim
        self.self_attn = RelativeMultiHeadAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)
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
        source_BRD = self.self_attn_layer_norm(hidden_BRD) if self.pre_norm else hidden_BRD
        asking_BQD, residual_BQD = source_BRD, hidden_BRD
        if wanted_BP is not None:
            asking_BQD = _take_rows(source_BRD, wanted_BP)
            residual_BQD = _take_rows(hidden_BRD, wanted_BP)

        gathered_BQD = self.self_attn(asking_BQD, source_BRD[:, :num_keys], blocks)
        hidden_BQD = residual_BQD + self.dropout(gathered_BQD)
        if self.pre_norm:
            thought_BQD = self._feed_forward(self.final_layer_norm(hidden_BQD))
            return hidden_BQD + thought_BQD
        hidden_BQD = self.self_attn_layer_norm(hidden_BQD)
        thought_BQD = self._feed_forward(hidden_BQD)
        return self.final_layer_norm(hidden_BQD + thought_BQD)

    def _feed_forward(self, hidden_BQD: torch.Tensor) -> torch.Tensor:
        inner_BQF = self.activation_dropout(activate(self.activation_fn, self.fc1(hidden_BQD)))
        return self.dropout(self.fc2(inner_BQF))


class SentenceEncoder(nn.Module):
    """Embeddings, the layers, and the one relative position bias that they share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embed_dim = config.encoder_embed_dim
        self.embed_tokens = nn.Embedding(
            config.vocab_size, embed_dim, padding_idx=config.pad_token_id
        )
        self.embed_positions = build_position_embedding(config)
        self.emb_layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.relative_attention_bias = (
            RelativePositionBias(config) if config.relative_attention_num_buckets else None
        )
        self.layers = nn.ModuleList(
            SentenceEncoderLayer(config) for _ in range(config.encoder_layers)
        )

    def forward(self, rows: Rows) -> torch.Tensor:
        """Run rows through the network.

        Returns:
            (B, P, D), what the loss rows became; (B, R, D) where all rows are wanted.
        """
        hidden_BRD = self.embed_tokens(rows.input_ids) + self.embed_positions(rows.positions)
        if not self.config.normalize_before:
            hidden_BRD = self.emb_layer_norm(hidden_BRD)
        hidden_BRD = self.dropout(hidden_BRD)

        # All layers share one bias, so that it is built once, before the first of them.
        blocks = tuple(self._with_bias(block, hidden_BRD) for block in rows.blocks)
        last_blocks = blocks
        if rows.loss_rows is not None:
            last_blocks = (self._with_bias(rows.last_block, hidden_BRD),)

        for layer in self.layers[:-1]:
            hidden_BRD = layer(hidden_BRD, rows.num_keys, blocks)
        hidden_BQD = self.layers[-1](hidden_BRD, rows.num_keys, last_blocks, rows.loss_rows)
        if self.config.normalize_before:
            hidden_BQD = self.emb_layer_norm(hidden_BQD)
        return hidden_BQD

    def _with_bias(self, block: Block, hidden_BRD: torch.Tensor) -> BiasedBlock:
        bias: torch.Tensor | None = None
        if self.relative_attention_bias is not None:
            bias = self.relative_attention_bias.for_pairs(
                block.query_positions, block.key_positions
            )
        elif block.visible is not None:
            bias = hidden_BRD.new_zeros(())
        if bias is not None:
            if block.visible is not None:
                bias = bias.masked_fill(~block.visible[:, None], float("-inf"))
            bias = bias.to(_compute_dtype(hidden_BRD))
        return BiasedBlock(block.rows, block.key_positions.shape[1], bias)


def _take_rows(hidden_BRD: torch.Tensor, wanted_BP: torch.Tensor) -> torch.Tensor:
    return hidden_BRD.gather(1, wanted_BP[:, :, None].expand(-1, -1, hidden_BRD.shape[2]))


def _compute_dtype(hidden_BRD: torch.Tensor) -> torch.dtype:
    """Return the type in which attention will run: autocast's, where it is on.

    The bias has to be of that type. Cast here, it is cast once and not in each layer.
    """
    device_type = hidden_BRD.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_BRD.dtype
