"""Ask a checkpoint: what it predicts, and what its predictions attend to.

**Attention without a second implementation.** Attention is softmax(Q K^T + bias) V. If V is the
identity matrix, the result is the softmax: the weights. So the book's own function is called again,
with other values:

>>> query_BHQK, key_BHMK, value_BHMK = torch.randn(3, 1, 2, 4, 8)
>>> block, found = BiasedBlock(4, 4, bias=None), []
>>> attended_BQHK = recording(found).attend(query_BHQK, key_BHMK, value_BHMK, (block,), 0.0)
>>> weights_BHQM = found[0].transpose(1, 2)
>>> torch.allclose((weights_BHQM @ value_BHMK).transpose(1, 2), attended_BQHK, atol=1e-6)
True

    E entries    P predictions    Q queries    M keys    H heads    K width of a head
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.conversion import LoadedWeights, load_any
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import ConfigError, shown
from annotated_mpnet.files.records import reading
from annotated_mpnet.mpnet.attention import EAGER, Attention, BiasedBlock
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.mpnet.two_stream import Entries
from annotated_mpnet.text.tokenizer import load_tokenizer, tokenizer_hash, vocabulary_of

GUESSES = 5


def recording(found: list[Tensor]) -> Attention:
    """Return the book's attention; it appends each layer's weights, (B, Q, H, M), to `found`."""

    def attend(
        query_BHQK: Tensor,
        key_BHMK: Tensor,
        value_BHMK: Tensor,
        blocks: tuple[BiasedBlock, ...],
        dropout: float,
    ) -> Tensor:
        num_keys, width = key_BHMK.shape[2:]
        # K columns of the identity at a time, because values are K wide.
        columns = torch.eye(num_keys, -(-num_keys // width) * width, dtype=key_BHMK.dtype)
        parts = [
            EAGER.attend(query_BHQK, key_BHMK, value_MK.expand_as(key_BHMK), blocks, 0.0)
            for value_MK in torch.split(columns, width, dim=1)
        ]
        found.append(torch.cat(parts, dim=3)[:, :, :, :num_keys])
        return EAGER.attend(query_BHQK, key_BHMK, value_BHMK, blocks, dropout)

    return Attention(attend)


@dataclass(frozen=True)
class Guess:
    """A token that a model expects, and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What a model says to a prediction.

    Attributes:
        guesses: the likeliest first; empty for a sentence encoder, whose head is made up.
        bits: -log2 of the probability of the right token; None for a sentence encoder.
        attention: of the predicting entry, for each layer, head and key, in thousandths.
    """

    guesses: tuple[Guess, ...] = ()
    bits: float | None = None
    attention: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """A model that can be asked, and its tokenizer."""

    model: MPNetForPretraining
    has_head: bool
    tokenizer: PreTrainedTokenizerFast
    tokenizer_name: str
    notes: tuple[str, ...]

    def __call__(
        self, entries: Entries, right: list[int], label: Callable[[int], str]
    ) -> list[Answer]:
        """Return what the model says to each prediction; `right` are the tokens to predict."""
        found: list[Tensor] = []
        self.model.use_attention(recording(found))
        with torch.inference_mode():
            logits_PV = self.model.logits(self.model.sentence_encoder(entries))[0]
        assert entries.loss_entries is not None
        wanted_P = entries.loss_entries[0]
        # The last layer computes the predicting entries only.
        layers_PHM = [weights_BQHM[0, wanted_P] for weights_BQHM in found[:-1]] + [found[-1][0]]
        attention = torch.stack(layers_PHM, dim=1).mul(1000).round().int().tolist()
        if not self.has_head:
            return [Answer(attention=each) for each in attention]
        log_PV = logits_PV.float().log_softmax(dim=1)
        best = log_PV.exp().topk(min(GUESSES, log_PV.shape[1]), dim=1)
        bits_P = -log_PV.gather(1, torch.tensor(right)[:, None])[:, 0] / math.log(2)
        columns = (best.indices.tolist(), best.values.tolist(), bits_P.tolist(), attention)
        return [
            Answer(tuple(map(Guess, map(label, tokens), chances)), bits, weights)
            for tokens, chances, bits, weights in zip(*columns, strict=True)
        ]


def load(checkpoint: str, tokenizer_name: str | None) -> Asked:
    """Load a checkpoint of any kind with its tokenizer.

    Raises:
        CheckpointError: as `load_any`.
        ConfigError: the tokenizer is unknown, or another one than the checkpoint's.
    """
    loaded = load_any(checkpoint)
    tokenizer, name = _tokenizer_of(loaded, checkpoint, tokenizer_name)
    tokens, rows = vocabulary_of(tokenizer).size, loaded.config.vocab_size
    if tokens > rows:
        raise ConfigError(
            f"the tokenizer ({name[-200:]}) has {tokens} tokens, and {shown(checkpoint)} has "
            f"embeddings for {rows}; expected the tokenizer that it was trained with"
        )
    model = MPNetForPretraining(loaded.config)
    model.load_state_dict(loaded.tensors)
    notes = [*loaded.notes, *["so it makes no guesses"] * loaded.fresh_head]
    return Asked(model.eval(), not loaded.fresh_head, tokenizer, name, tuple(notes))


def _tokenizer_of(
    loaded: LoadedWeights, checkpoint: str, given: str | None
) -> tuple[PreTrainedTokenizerFast, str]:
    if loaded.tokenizer is None and given is None:
        raise ConfigError(
            f"{shown(checkpoint)} does not say which tokenizer it has; name it with "
            "--tokenizer-name"
        )
    own = None
    if loaded.tokenizer is not None:
        with reading("the tokenizer of the checkpoint"), quiet_transformers():
            own = load_tokenizer(loaded.tokenizer)
    if given is None:
        assert own is not None
        return own, "the model's own"
    with quiet_transformers():
        other = load_tokenizer(given)
    if own is not None and tokenizer_hash(own) != tokenizer_hash(other):
        raise ConfigError(
            f"--tokenizer-name {shown(given)} is another tokenizer than the one of "
            f"{shown(checkpoint)}, whose ids would mean other tokens; leave it out"
        )
    return other, given
