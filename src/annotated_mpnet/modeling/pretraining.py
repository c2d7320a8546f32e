"""MPNet for pretraining: rows in, predictions out.

The encoder knows nothing of objectives and the rows know nothing of networks; this module brings
the two together. What it adds is small: the head that turns a hidden state into a distribution over
the vocabulary, the initialisation, and the loss.

**Head.** dense, activation, LayerNorm, then the product with the *token embeddings* themselves plus
a bias for each token:

    logits = LayerNorm(activation(dense(hidden))) E^T + bias          (B, P, D) to (B, P, V)

Sharing ("tying") the table E saves 23 of 133 million weights in MPNet-base, and makes a token's
embedding the very vector that predicts it. Here are all of them, counted on the "meta" device,
where weights have shapes and no memory:

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

Only the P predicted rows come here. A logit costs 2 D operations, so that a row's V of them cost as
much as its way through three layers, and take 122 kB as float32; for all 512 rows of a sentence the
logits alone would be 62.5 MB, and a gradient of the same size. HF: `MPNetForMaskedLM` computes them
all, and its loss ignores the 85 % that are not predicted.

**Loss.** Cross-entropy, summed over the predicted tokens. Not the mean: the caller divides by the
number of predicted tokens of the whole update, all its micro-batches and all its devices. A mean of
means would weigh a token of a short micro-batch more than one of a long micro-batch. Say the first
has 10 predictions at 2 nats each, the second 90 at 4:

>>> (10 * 2 + 90 * 4) / (10 + 90), (2 + 4) / 2  # the mean; the mean of the means
(3.8, 3.0)

**Where it begins.** A network that knows nothing should give each of V tokens the same chance: a
loss of log2(V) bits, 14.9 for MPNet's vocabulary. It begins a little higher, because its first
logits are noise, and a confident guess that is wrong costs more than one that is right gains. The
LayerNorm of the head gives each of D features the size 1, E has a spread of 0.02, so that logits
have one of s = 0.02 sqrt(D), and the loss is s^2 / 2 nats over log(V): 0.22 bits at 768 wide. With
1024 tokens, log2(V) is 10:

>>> import math
>>> _ = torch.manual_seed(0)
>>> small = ModelConfig(vocab_size=1024, encoder_layers=1, encoder_ffn_dim=64)
>>> ids, positions = torch.randint(5, 1024, (8, 64)), torch.arange(10).expand(8, 10)
>>> with torch.no_grad():
...     logits_BPV = MPNetForPretraining(small).eval()(ids, positions, ids[:, :10].flip(1))
>>> predicted = 0.02 * math.sqrt(768), 10 + (0.02**2 * 768 / 2) / math.log(2)
>>> measured = logits_BPV.std().item(), cross_entropy_sum(logits_BPV, ids[:, :10].flip(1)).item()
>>> [f"{number:.1f}" for number in (*predicted, measured[0], measured[1] / 80 / math.log(2))]
['0.6', '10.2', '0.6', '10.2']

If a run starts far above that, its weights do not begin as they should. What comes next is the
*unigram plateau*, at the entropy of the token frequencies; below it, the network uses the context.

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
from annotated_mpnet.modeling.attention import (
    ATTENTIONS,
    TAKES_RULES,
    AttentionName,
    RelativeMultiHeadAttention,
)
from annotated_mpnet.modeling.encoder import SentenceEncoder, activate
from annotated_mpnet.modeling.two_stream import (
    Rows,
    mlm_rows,
    mpnet_rows,
    plm_rows,
    sentence_rows,
)


class MPNetLMHead(nn.Module):
    """From hidden states to scores over the vocabulary, through the token embeddings.

    Apart from the table it owns D x D + V weights and some biases and gains: 0.6 million in
    MPNet-base. The dense layer turns "what stands here, in this context" into "which embedding
    would fit"; the bias is free to learn how frequent each token is, whatever the context.
    """

    embed_tokens: nn.Embedding

    def __init__(self, config: ModelConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        embed_dim = config.encoder_embed_dim
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.layer_norm = nn.LayerNorm(embed_dim, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.activation_fn: ActivationName = config.activation_fn
        # A reference, not a sub-module: the table belongs to the encoder, and would otherwise stand
        # in the state dict twice. `nn.Module` registers every module that is assigned to it, unless
        # one goes around its `__setattr__`.
        object.__setattr__(self, "embed_tokens", embed_tokens)

    def forward(self, hidden_BPD: torch.Tensor) -> torch.Tensor:
        """Map hidden states (B, P, D) to logits (B, P, V)."""
        hidden_BPD = self.layer_norm(activate(self.activation_fn, self.dense(hidden_BPD)))
        return F.linear(hidden_BPD, self.embed_tokens.weight, self.bias)


class MPNetForPretraining(nn.Module):
    """The network and its objectives.

    Trained with `loss_sum`, used with `encode`. Nothing but `input_mode` differs between MPNet,
    BERT and XLNet here: same weights, same batch, other rows. So the objectives can be compared
    with all else equal, or changed in the middle of a run.
    """

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

        Raises:
            ValueError: a row is longer than `max_positions`, or the mode is unknown.
        """
        rows = self._rows(input_ids, predicted_positions, predicted_ids, attention_mask, input_mode)
        return self.lm_head(self.sentence_encoder(rows))

    def loss_sum(self, batch: Batch, input_mode: InputMode = "mpnet") -> torch.Tensor:
        """Return the summed cross-entropy, in nats, over a batch's predicted tokens (a scalar).

        To train, divide by the number of predicted tokens of the whole update before `backward`;
        to report bits per token, divide by `batch.num_predicted` and by log(2).
        """
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
        """Return the hidden states (B, L, D) of plain sentences (B, L), as Hugging Face's MPNet.

        This is what pretraining is for: nothing is masked, nothing predicted, there is neither
        content nor query, and the head is not used. Raises `ValueError` as `forward` does.
        """
        self._check_length(input_ids)
        rows = sentence_rows(input_ids, _as_numbers(attention_mask))
        return self.sentence_encoder(rows)

    def use_attention(self, name: AttentionName) -> None:
        """Choose how attention is computed: `attention.py` has the ways, which give the same."""
        for module in self.modules():
            if isinstance(module, RelativeMultiHeadAttention):
                module.attend = ATTENTIONS[name]
        self.sentence_encoder.bias_as_rule = name in TAKES_RULES

    def use_gradient_checkpointing(self, on: bool) -> None:
        """Keep each layer's input only, and compute the rest twice (`encoder.py`), or keep all."""
        self.sentence_encoder.recompute_layers = on

    def _rows(
        self,
        input_ids: torch.Tensor,
        predicted_positions: torch.Tensor,
        predicted_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        input_mode: InputMode,
    ) -> Rows:
        # The one place where the objectives part. From here on there are rows.
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
        # Without this, the table would be read past its end: on a GPU an assertion far from here,
        # after which the process can only be restarted.
        length, longest = input_ids.shape[1], self.config.max_positions
        if length > longest:
            raise ValueError(f"rows of {length} tokens; the position table ends at {longest}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights from PyTorch's global generator.

        Paper: as BERT; N(0, 0.02) for all matrices and tables, biases zero, norms one. So at first
        each row is mostly itself: what a layer adds is small against what is already there, each
        query attends about evenly to all keys it may see, and no token is preferred. (A run then
        lets some heads prefer a neighbour: `local_start.py`.)

        PyTorch's own start would give tables N(0, 1): logits of a size of 28 instead of 0.55, at
        768 wide, and a loss of more than a hundred bits.
        """
        # The order of the names decides which random numbers a weight gets, so that adding a
        # parameter in the middle would change all those after it.
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(mean=0.0, std=0.02)
        # Last, because the loop above has filled these rows too. As input, padding keeps its zeros:
        # look-ups of `padding_idx` give no gradient. But as a row of E it is scored like the rest,
        # and so the head does move it, away from what it would be predicted by.
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
        # fairseq stores the tied matrix under both of its names. Equal, one of them is enough;
        # different, half of the model would be lost in silence.
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
    """Return the summed cross-entropy in nats, in float32, of logits (B, P, V) against ids (B, P).

    For one token, -log softmax(logits)[id]. Empty slots add nothing, and get a gradient of zero:

    >>> import math
    >>> logits_BPV, ids_BP = torch.zeros(1, 3, 8), torch.tensor([[5, 2, NOT_PREDICTED]])
    >>> (cross_entropy_sum(logits_BPV, ids_BP) / math.log(2)).item()  # 2 tokens, 3 bits each
    6.0

    Under autocast the logits come in bfloat16, with 8 bits of precision: near a loss of 15 nats
    that is a step of 0.06. So they are widened first, before the sum over the vocabulary.
    """
    return F.cross_entropy(
        logits_BPV.float().flatten(0, 1),
        predicted_ids.flatten(),
        reduction="sum",
        ignore_index=NOT_PREDICTED,
    )
