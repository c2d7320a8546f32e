"""MPNet for pretraining: a batch in, predictions and a loss out.

**Head.** A dense layer, an activation, LayerNorm, and then a product with the *token embeddings* W
themselves, plus a bias for each token:

    logits = LayerNorm(activation(dense(hidden))) W^T + bias          (B, P, D) to (B, P, V)

Tying the output to the embeddings saves 23 of 133 million weights in MPNet-base. These are left:

>>> with torch.device("meta"):
...     model = MPNetForPretraining(ModelConfig())
>>> parts = [*model.sentence_encoder.named_children(), ("lm_head", model.lm_head), ("all", model)]
>>> for name, part in parts:
...     if count := sum(parameter.numel() for parameter in part.parameters()):
...         print(f"{name:23} {count:11,}")
embed_tokens             23,444,736
embed_positions             394,752
emb_layer_norm                1,536
relative_attention_bias         384
layers                   85,054,464
lm_head                     622,655
all                     109,518,527

Only the P predicting entries reach the head, because the V logits of one entry cost as much as
three layers. (Hugging Face's `MPNetForMaskedLM` computes them for all positions.)

**Loss.** Cross-entropy, summed over the predicted tokens. The loop divides by the number of
predicted tokens in the whole update. The mean of a micro-batch would weigh tokens of short
micro-batches more.

**Where the loss begins.** A network that knows nothing should give all V tokens the same chance: a
loss of log2(V) bits, 14.9 with MPNet's vocabulary. It begins slightly higher: the head's LayerNorm
gives D features of size 1 and W has std 0.02, so the logits have std s = 0.02 sqrt(D), which adds
s^2 / 2 nats (0.22 bits in MPNet-base). With 1024 tokens, log2(V) is 10:

>>> import math
>>> _ = torch.manual_seed(0)
>>> small = ModelConfig(vocab_size=1024, encoder_layers=1, encoder_ffn_dim=64)
>>> ids, positions = torch.randint(5, 1024, (8, 64)), torch.arange(10).expand(8, 10)
>>> with torch.no_grad():
...     logits_BPV = MPNetForPretraining(small).eval()(ids, positions, ids[:, :10].flip(1))
>>> loss = cross_entropy_sum(logits_BPV, ids[:, :10].flip(1)).item()
>>> f"std {logits_BPV.std():.2f}, loss {loss / 80 / math.log(2):.1f} bits"
'std 0.55, loss 10.2 bits'

Next: `mpnet/masking.py`, how the predicted tokens are chosen and corrupted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annotated_mpnet.mpnet.attention import Attention, RelativeMultiHeadAttention
from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import InputMode, ModelConfig
from annotated_mpnet.mpnet.encoder import ACTIVATIONS, SentenceEncoder
from annotated_mpnet.mpnet.two_stream import (
    mlm_entries,
    mpnet_entries,
    plm_entries,
    sentence_entries,
)


class MPNetLMHead(nn.Module):
    """From hidden states to logits over the vocabulary. The bias can learn token frequencies."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        embed_dim = config.encoder_embed_dim
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.activation = ACTIVATIONS[config.activation_fn]
        # How the last product is computed, not what it is: free to change.
        self.project: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear

    def forward(self, hidden_BPD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return logits (B, P, V), with the tied token embeddings as the last matrix."""
        features_BPD = self.layer_norm(self.activation(self.dense(hidden_BPD)))
        return self.project(features_BPD, weight_VD, self.bias)


class MPNetForPretraining(nn.Module):
    """The network and its objectives. Parameters have fairseq's names.

    MPNet, BERT and XLNet differ only in `input_mode`: same weights, other entries.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sentence_encoder = SentenceEncoder(config)
        self.lm_head = MPNetLMHead(config)
        self.cross_entropy_sum = cross_entropy_sum
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        predicted_positions: Tensor,
        predicted_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_mode: InputMode = "mpnet",
    ) -> Tensor:
        """Predict tokens.

        Args:
            input_ids: (B, L). In `mpnet` and `mlm` mode the masked sentence, in `plm` mode the
                original one. This and the next three are the tensors of a `Batch`.
            predicted_positions: (B, P).
            predicted_ids: (B, P).
            attention_mask: (B, L), or None.
            input_mode: the objective.

        Returns:
            Logits (B, P, V). Those of an empty slot mean nothing.

        Raises:
            ValueError: a sequence is longer than `max_positions`, or the mode is unknown.
        """
        self._check_length(input_ids)
        batch = input_ids, predicted_positions, predicted_ids, _as_numbers(attention_mask)
        match input_mode:
            case "mpnet":
                entries = mpnet_entries(*batch)
            case "mlm":
                entries = mlm_entries(*batch)
            case "plm":
                entries = plm_entries(*batch, mask_token_id=self.config.mask_token_id)
            case _:
                raise ValueError(f"input_mode is {input_mode!r}; expected mpnet, mlm or plm")
        return self.logits(self.sentence_encoder(entries))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (B, P, V) of hidden states (B, P, D)."""
        return self.lm_head(hidden, self.sentence_encoder.embed_tokens.weight)

    def loss_sum(self, batch: Batch, input_mode: InputMode = "mpnet") -> Tensor:
        """Return the summed cross-entropy, in nats, over a batch's predicted tokens (a scalar).

        In bits per token: divided by `batch.num_predicted` and by log(2).
        """
        slots = batch.predicted_positions, batch.predicted_ids
        logits_BPV = self(batch.input_ids, *slots, batch.attention_mask, input_mode)
        return self.cross_entropy_sum(logits_BPV, batch.predicted_ids)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, L, D) of plain sentences (B, L), as Hugging Face's MPNet.

        This is what pretraining is for. Raises `ValueError` as `forward` does.
        """
        self._check_length(input_ids)
        return self.sentence_encoder(sentence_entries(input_ids, _as_numbers(attention_mask)))

    def use_attention(self, attention: Attention) -> None:
        """Choose how attention is computed; all ways give the same result to rounding."""
        self.sentence_encoder.make_bias = attention.make_bias
        for module in self.modules():
            if isinstance(module, RelativeMultiHeadAttention):
                module.attend = attention.attend

    def use_gradient_checkpointing(self, on: bool) -> None:
        """Keep only the input of each layer for the backward pass, and recompute the rest."""
        self.sentence_encoder.recompute_layers = on

    def _check_length(self, input_ids: Tensor) -> None:
        # A GPU would read past the end of the position table, and end the process.
        length, longest = input_ids.shape[1], self.config.max_positions
        if length > longest:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_positions {longest}"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights from PyTorch's global generator.

        As in BERT and in the paper: N(0, 0.02) for all matrices and tables, biases zero, norms one.
        (A run then lets some heads prefer a neighbour: `mpnet/local_start.py`.) PyTorch's own
        N(0, 1) for tables would give a loss of more than a hundred bits.
        """
        # In the order of the names, which decides which random numbers a weight gets.
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(mean=0.0, std=0.02)
        # As an input, padding gets no gradient and stays zero. As a row of W it does move.
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()


def _as_numbers(attention_mask: Tensor | None) -> Tensor | None:
    # Masks also come as booleans and floats.
    return None if attention_mask is None else attention_mask.long()


def cross_entropy_sum(logits_BPV: Tensor, predicted_ids: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats, in float32, of logits (B, P, V) against ids (B, P).

    Empty slots add nothing, and get a gradient of zero:

    >>> import math
    >>> logits_BPV, ids_BP = torch.zeros(1, 3, 8), torch.tensor([[5, 2, NOT_PREDICTED]])
    >>> (cross_entropy_sum(logits_BPV, ids_BP) / math.log(2)).item()  # 2 tokens, 3 bits each
    6.0

    Logits come in bfloat16 under autocast, which is too coarse for a sum over the vocabulary.
    """
    return F.cross_entropy(
        logits_BPV.float().flatten(0, 1),
        predicted_ids.flatten(),
        reduction="sum",
        ignore_index=NOT_PREDICTED,
    )
