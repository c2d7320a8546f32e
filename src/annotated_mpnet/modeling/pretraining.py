"""MPNet for pretraining: rows in, predictions out.

The encoder knows nothing of objectives and the rows know nothing of networks; this module brings
the two together. What it adds is small: the head that turns a hidden state into a distribution over
the vocabulary, the initialisation, and the loss.

**Head.** dense, activation, LayerNorm, then the product with the *token embeddings* themselves plus
a bias for each token. Sharing ("tying") the table saves 23 of 133 million weights in MPNet-base,
and makes a token's embedding the very vector that predicts it. Only the P predicted rows come here:
with a vocabulary of 30,527 the product for all L rows would cost as much as three layers.

**Loss.** Cross-entropy, summed over the predicted tokens. Not the mean: the caller divides by the
number of predicted tokens of the whole update, all its micro-batches and all its devices. A mean of
means would weigh a token of a short micro-batch more than one of a long micro-batch.

Names of parameters are fairseq's, so that Microsoft's and annotated-mpnet's weights load without a
table of names.

Next: `data/sources.py`, where the text comes from; or `training/trainer.py`, the loop.

    B batch   L tokens of a sentence   P predicted tokens   D embed_dim   V vocabulary
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from annotated_mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.config import ActivationName, InputMode, ModelConfig
from annotated_mpnet.modeling.encoder import SentenceEncoder, activate
from annotated_mpnet.modeling.two_stream import (
    Rows,
    mlm_rows,
    mpnet_rows,
    plm_rows,
    sentence_rows,
)


class MPNetLMHead(nn.Module):
    """From hidden states to scores over the vocabulary, through the token embeddings."""

    embed_tokens: nn.Embedding

    def __init__(self, config: ModelConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        embed_dim = config.encoder_embed_dim
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.activation_fn: ActivationName = config.activation_fn
        # A reference, not a sub-module: the table belongs to the encoder, and would otherwise stand
        # in the state dict twice.
        object.__setattr__(self, "embed_tokens", embed_tokens)

    def forward(self, hidden_BPD: torch.Tensor) -> torch.Tensor:
        """Map hidden states (B, P, D) to logits (B, P, V)."""
        hidden_BPD = self.layer_norm(activate(self.activation_fn, self.dense(hidden_BPD)))
        return F.linear(hidden_BPD, self.embed_tokens.weight, self.bias)


class MPNetForPretraining(nn.Module):
    """The network and its objectives."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sentence_encoder = SentenceEncoder(config)
        self.lm_head = MPNetLMHead(config, self.sentence_encoder.embed_tokens)
        self.reset_parameters()

    def forward(
        self,
        input_ids: torch.Tensor,
        predicted_positions: torch.Tensor,
        predicted_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_mode: InputMode = "mpnet",
    ) -> torch.Tensor:
        """Predict tokens.

        Args:
            input_ids: (B, L). In `mpnet` and `mlm` mode the masked sentence, which also says what
                stands in for each predicted token; in `plm` mode the original one.
            predicted_positions: (B, P), in the order of prediction.
            predicted_ids: (B, P), the original tokens there; -100 in an empty slot. What a slot
                predicts never depends on its own token, only on those of earlier slots.
            attention_mask: (B, L), 1 for real tokens, 0 for padding; None if all are real. Where
                documents share a row, the number of each token's document, 1, 2, 3, ...
            input_mode: the objective.

        Returns:
            Logits (B, P, V). Those of an empty slot mean nothing.
        """
        rows = self._rows(input_ids, predicted_positions, predicted_ids, attention_mask, input_mode)
        return self.lm_head(self.sentence_encoder(rows))

    def loss_sum(self, batch: Batch, input_mode: InputMode = "mpnet") -> torch.Tensor:
        """Return the summed cross-entropy, in nats, over a batch's predicted tokens (a scalar)."""
        logits_BPV = self(
            batch.input_ids,
            batch.predicted_positions,
            batch.predicted_ids,
            batch.attention_mask,
            input_mode,
        )
        return cross_entropy_sum(logits_BPV, batch.predicted_ids)

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the hidden states (B, L, D) of plain sentences (B, L), as Hugging Face's MPNet."""
        self._check_length(input_ids)
        rows = sentence_rows(input_ids, _as_numbers(attention_mask))
        return self.sentence_encoder(rows)

    def _rows(
        self,
        input_ids: torch.Tensor,
        predicted_positions: torch.Tensor,
        predicted_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        input_mode: InputMode,
    ) -> Rows:
        self._check_length(input_ids)
        tensors = (input_ids, predicted_positions, predicted_ids, _as_numbers(attention_mask))
        match input_mode:
            case "mpnet":
                return mpnet_rows(*tensors)
            case "mlm":
                return mlm_rows(*tensors)
            case "plm":
                return plm_rows(*tensors, mask_token_id=self.config.mask_token_id)
        raise ValueError(f"input_mode is {input_mode!r}; expected mpnet, mlm or plm")

    def _check_length(self, input_ids: torch.Tensor) -> None:
        length, longest = input_ids.shape[1], self.config.max_positions
        if length > longest:
            raise ValueError(f"rows of {length} tokens; the position table ends at {longest}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights from PyTorch's global generator.

        Paper: as BERT; N(0, 0.02) for all matrices and tables, biases zero, norms one. Small
        weights keep the first hidden states, and so the first logits, near zero: the loss begins
        near that of guessing evenly, log(V).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(mean=0.0, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def load_fairseq_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load Microsoft's or annotated-mpnet's weights, which have our names but for a prefix.

        Accepts the prefixes `decoder.` and, of a compiled model, `_orig_mod.`; and `lm_head.weight`
        if it is the tied token embedding. The one-element buffer that fairseq's sinusoidal
        positions keep is left out: it only tells them their device.

        Raises:
            ValueError: if `lm_head.weight` is another matrix than the token embedding.
            RuntimeError: if a weight is missing, unexpected, or has another shape; PyTorch's
                message names each.
        """
        renamed = {
            name.removeprefix("_orig_mod.").removeprefix("decoder."): tensor
            for name, tensor in state_dict.items()
        }
        tied = renamed.pop("lm_head.weight", None)
        if self.config.position_embedding == "sinusoidal":
            renamed.pop("sentence_encoder.embed_positions._float_tensor", None)
        table = renamed.get("sentence_encoder.embed_tokens.weight")
        if tied is not None and table is not None and not torch.equal(tied, table):
            raise ValueError("lm_head.weight differs from the token embedding: not a tied model")
        self.load_state_dict(renamed, strict=True)


def _as_numbers(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    # Masks come as booleans and floats too; documents are told apart by whole numbers.
    return None if attention_mask is None else attention_mask.long()


def cross_entropy_sum(logits_BPV: torch.Tensor, predicted_ids: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy in nats, in float32, of logits against ids (B, P)."""
    return F.cross_entropy(
        logits_BPV.float().flatten(0, 1),
        predicted_ids.flatten(),
        reduction="sum",
        ignore_index=NOT_PREDICTED,
    )
