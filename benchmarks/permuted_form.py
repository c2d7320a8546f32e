"""MPNet in the form of the paper, in PyTorch's standard operations, to compare with ours.

    content stream   [others | predicted tokens, revealed | corrupted]   L + P queries and keys
    query stream     [corrupted]                                         P queries

The sentence is permuted so that its predicted tokens come last. Each sequence then has its own
order, and with it its own bias and mask, (B, H, L + P, L + P) for the content stream alone. Ours
avoids this (`annotated_mpnet/mpnet/two_stream.py`), and the benchmarks measure what that gains.

The form is implemented well: the bias is built once for all layers, both streams share one
feed-forward pass, attention is `scaled_dot_product_attention`. It uses our network's weights, so a
test can compare the two.

    B batch   L tokens   P predicted tokens   M = L + P content entries   Q = L + 2 P queries
    D embed_dim   H heads   K head_dim
"""

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.encoder import SentenceEncoderLayer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining, cross_entropy_sum


class PermutedForm(nn.Module):
    """Computes a network's loss in the permuted form."""

    def __init__(self, model: MPNetForPretraining) -> None:
        super().__init__()
        self.model = model

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Return the summed cross-entropy; every sequence must predict P tokens."""
        encoder = self.model.sentence_encoder
        (B, L), P = batch.input_ids.shape, batch.predicted_ids.shape[1]
        if (batch.predicted_ids == NOT_PREDICTED).any():
            raise ValueError(f"a sequence predicts fewer than {P} tokens; expected {P} in each")

        # Other tokens in natural order, then the predicted ones in prediction order.
        predicted_BL = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        predicted_BL.scatter_(1, batch.predicted_positions, True)
        others_BN = (~predicted_BL).nonzero()[:, 1].view(B, L - P)
        corrupted_BP = batch.input_ids.gather(1, batch.predicted_positions)
        content_BM = torch.cat(
            [batch.input_ids.gather(1, others_BN), batch.predicted_ids, corrupted_BP], dim=1
        )
        positions_BM = torch.cat(
            [others_BN, batch.predicted_positions, batch.predicted_positions], dim=1
        )

        hidden_BQD = encoder.embed_tokens(torch.cat([content_BM, corrupted_BP], dim=1))
        positions_BQ = torch.cat([positions_BM, batch.predicted_positions], dim=1)
        hidden_BQD = hidden_BQD + encoder.embed_positions(positions_BQ)
        hidden_BQD = encoder.dropout(encoder.emb_layer_norm(hidden_BQD))
        bias_BHQM = encoder.relative_attention_bias.for_pairs(positions_BQ, positions_BM)
        invisible = ~_visible(L - P, P, bias_BHQM.device)
        if batch.attention_mask is not None:
            # Padding is invisible, wherever the permutation has put it.
            is_token_BM = batch.attention_mask.gather(1, positions_BM) > 0
            invisible = invisible | ~is_token_BM[:, None, None]
        bias_BHQM = bias_BHQM.masked_fill(invisible, float("-inf"))
        if torch.is_autocast_enabled(bias_BHQM.device.type):
            bias_BHQM = bias_BHQM.to(torch.get_autocast_dtype(bias_BHQM.device.type))
        content, query = bias_BHQM[:, :, : L + P].contiguous(), bias_BHQM[:, :, L + P :]
        for layer in encoder.layers:
            hidden_BQD = _layer(layer, hidden_BQD, L + P, (content, query.contiguous()))
        logits_BPV = self.model.logits(hidden_BQD[:, L + P :])
        return cross_entropy_sum(logits_BPV, batch.predicted_ids)


def _visible(others: int, P: int, device: torch.device) -> torch.Tensor:
    """Return (L + 2P, L + P): which query sees which key, the same for all sequences."""
    known = torch.cat(
        [
            torch.zeros(others, dtype=torch.long),
            torch.arange(1, P + 1),
            torch.zeros(P, dtype=torch.long),
            torch.arange(P),
        ]
    )[:, None]
    # A query sees the first `known` predicted tokens, and corrupted ones for the rest.
    revealed = torch.arange(1, P + 1)[None] <= known
    return torch.cat(
        [torch.ones(len(known), others, dtype=torch.bool), revealed, ~revealed], dim=1
    ).to(device)


def _layer(
    layer: SentenceEncoderLayer,
    hidden_BQD: torch.Tensor,
    num_content: int,
    biases: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Run a post-norm layer over both streams."""
    attention = layer.self_attn
    D = attention.embed_dim
    content_BMD = hidden_BQD[:, :num_content]
    query_BQD = F.linear(hidden_BQD, attention.in_proj_weight[:D], attention.in_proj_bias[:D])
    key_value = F.linear(content_BMD, attention.in_proj_weight[D:], attention.in_proj_bias[D:])
    query, key, value = (
        each.view(*each.shape[:2], attention.num_heads, -1).transpose(1, 2)
        for each in (query_BQD, *key_value.chunk(2, dim=2))
    )
    dropout = attention.dropout if layer.training else 0.0
    attended = [
        F.scaled_dot_product_attention(stream, key, value, attn_mask=bias, dropout_p=dropout)
        for stream, bias in zip(
            (query[:, :, :num_content], query[:, :, num_content:]), biases, strict=True
        )
    ]
    attended_BQD = torch.cat(attended, dim=2).transpose(1, 2).flatten(2)
    hidden_BQD = layer.self_attn_layer_norm(
        hidden_BQD + layer.dropout(attention.out_proj(attended_BQD))
    )
    inner = layer.activation_dropout(layer.activation(layer.fc1(hidden_BQD)))
    return layer.final_layer_norm(hidden_BQD + layer.dropout(layer.fc2(inner)))
