"""MPNet as the paper draws it, in batches, with standard operations: what we compare with.

    content   [others | predicted, revealed | stand-ins]     L + P rows, which ask and answer
    query     [stand-ins]                                    P rows, which ask

The sentence is permuted so that what is predicted comes last; each row has an order of its own, and
with it a bias of its own and a mask of its own, (B, H, L + P, L + P). That is what the formulation
in `annotated_mpnet/mpnet/two_stream.py` avoids, and what the benchmark weighs.

Nothing here is slow on purpose. The bias is built once for all layers; both streams share their
feed-forward part; attention is `scaled_dot_product_attention`, the optimizer is fused. The weights
are those of our network, so that a test can hold the two against each other.

    B batch   L tokens   P predicted tokens   M = L + P content rows   Q rows that ask   D embed_dim
    H heads   K head_dim
"""

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.encoder import SentenceEncoderLayer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining, cross_entropy_sum


class PermutedForm(nn.Module):
    """Computes the loss of a network in the permuted form; each row must predict P tokens."""

    def __init__(self, model: MPNetForPretraining) -> None:
        super().__init__()
        self.model = model

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Return the summed cross-entropy of a batch in which each row predicts P tokens."""
        if (batch.predicted_ids == NOT_PREDICTED).any():
            raise ValueError("a row predicts less than others; the permuted form here takes none")
        encoder = self.model.sentence_encoder
        (B, L), P = batch.input_ids.shape, batch.predicted_ids.shape[1]

        # What is not predicted in natural order, then what is, in the order of prediction.
        predicted_BL = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        predicted_BL.scatter_(1, batch.predicted_positions, True)
        others_BN = (~predicted_BL).nonzero()[:, 1].view(B, L - P)
        stand_in_BP = batch.input_ids.gather(1, batch.predicted_positions)
        content_BM = torch.cat(
            [batch.input_ids.gather(1, others_BN), batch.predicted_ids, stand_in_BP], dim=1
        )
        positions_BM = torch.cat(
            [others_BN, batch.predicted_positions, batch.predicted_positions], dim=1
        )

        hidden_BQD = encoder.embed_tokens(torch.cat([content_BM, stand_in_BP], dim=1))
        rows_BQ = torch.cat([positions_BM, batch.predicted_positions], dim=1)
        hidden_BQD = hidden_BQD + encoder.embed_positions(rows_BQ)
        hidden_BQD = encoder.dropout(encoder.emb_layer_norm(hidden_BQD))
        bias_BHQM = encoder.relative_attention_bias.for_pairs(rows_BQ, positions_BM)
        hidden = ~_sees(L - P, P, bias_BHQM.device)
        if batch.attention_mask is not None:
            # Nobody sees padding, wherever the permutation has put it.
            is_token_BM = batch.attention_mask.gather(1, positions_BM) > 0
            hidden = hidden | ~is_token_BM[:, None, None]
        bias_BHQM = bias_BHQM.masked_fill(hidden, float("-inf"))
        if torch.is_autocast_enabled(bias_BHQM.device.type):
            bias_BHQM = bias_BHQM.to(torch.get_autocast_dtype(bias_BHQM.device.type))
        content, query = bias_BHQM[:, :, : L + P].contiguous(), bias_BHQM[:, :, L + P :]
        for layer in encoder.layers:
            hidden_BQD = _layer(layer, hidden_BQD, L + P, (content, query.contiguous()))
        logits_BPV = self.model.logits(hidden_BQD[:, L + P :])
        return cross_entropy_sum(logits_BPV, batch.predicted_ids)


def _sees(others: int, P: int, device: torch.device) -> torch.Tensor:
    """Return (L + 2P, L + P): who sees whom, the same for all rows of a batch."""
    known = torch.cat(
        [
            torch.zeros(others, dtype=torch.long),
            torch.arange(1, P + 1),
            torch.zeros(P, dtype=torch.long),
            torch.arange(P),
        ]
    )[:, None]
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
        rows.view(*rows.shape[:2], attention.num_heads, -1).transpose(1, 2)
        for rows in (query_BQD, *key_value.chunk(2, dim=2))
    )
    dropout = attention.dropout if layer.training else 0.0
    gathered = [
        F.scaled_dot_product_attention(asking, key, value, attn_mask=bias, dropout_p=dropout)
        for asking, bias in zip(
            (query[:, :, :num_content], query[:, :, num_content:]), biases, strict=True
        )
    ]
    gathered_BQD = torch.cat(gathered, dim=2).transpose(1, 2).flatten(2)
    hidden_BQD = layer.self_attn_layer_norm(
        hidden_BQD + layer.dropout(attention.out_proj(gathered_BQD))
    )
    inner = layer.activation_dropout(layer.activation(layer.fc1(hidden_BQD)))
    return layer.final_layer_norm(hidden_BQD + layer.dropout(layer.fc2(inner)))
