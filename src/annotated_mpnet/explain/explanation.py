"""Compute what the model is given for a sentence, and what each entry of it may see.

Nothing here decides anything: `mpnet/collator.py` chooses and corrupts, `mpnet/two_stream.py` makes
the entries and says who sees whom, and this module writes down the result in plain words and
numbers. All three objectives get the same predicted tokens in the same order, so they can be
compared.

>>> from annotated_mpnet.explain.sentence import word_tokenizer
>>> tokenizer = word_tokenizer("The cat sat on the mat.")
>>> explanation = explain(
...     "The cat sat on the mat.", tokenizer, ObjectiveConfig(rand_prob=0, keep_prob=0),
...     predict="mat, sat")
>>> [token.reads for token in explanation.tokens]
['<s>', 'The', 'cat', '<mask>', 'on', 'the', '<mask>', '.', '</s>']
>>> for name, objective in explanation.objectives.items():
...     for each in objective.predictions:
...         seen = objective.seen_by(each.entry)
...         print(name, each.number, *(key.seen_as if key else "--" for key in seen))
mpnet 1 <s> The cat <mask> on the <mask> . </s>
mpnet 2 <s> The cat <mask> on the mat . </s>
mlm 1 <s> The cat <mask> on the <mask> . </s>
mlm 2 <s> The cat <mask> on the <mask> . </s>
plm 1 <s> The cat -- on the -- . </s>
plm 2 <s> The cat -- on the mat . </s>

    L sequence length    P predicted tokens    E entries    M keys    Q queries
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.explain.model import Answer, Asked
from annotated_mpnet.explain.sentence import Sentence
from annotated_mpnet.mpnet import masking
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    NumberedSequence,
)
from annotated_mpnet.mpnet.config import InputMode, ModelConfig, ObjectiveConfig
from annotated_mpnet.mpnet.positions import relative_position_bucket
from annotated_mpnet.mpnet.two_stream import Entries, mlm_entries, mpnet_entries, plm_entries

MAX_TOKENS = 128
"""A picture of more cannot be read, and a page with all attention weights would take megabytes."""

NAMES: dict[InputMode, str] = {"mpnet": "MPNet", "mlm": "MLM (BERT)", "plm": "PLM (XLNet)"}

Kind = Literal["", "mask", "random", "kept"]
Group = Literal["sentence", "content", "query"]


@dataclass(frozen=True)
class Token:
    """A token of the sentence.

    Attributes:
        text: as its tokenizer writes it.
        word: the position where its word begins; -1 for a special token.
        rank: its place in the prediction order, from 1; 0 if it is not predicted.
        kind: what replaces it in the masked sentence; empty if it is not predicted.
        reads: what the masked sentence has at its position.
    """

    text: str
    word: int
    rank: int
    kind: Kind
    reads: str


@dataclass(frozen=True)
class Entry:
    """What goes through the network.

    Attributes:
        group: masked sentence, content or query; in `plm` the original sentence is content.
        position: in the sentence.
        reads: its input token.
        seen_as: the same, with a "?" if it is in place of a mask: a random or a kept token.
        time: how many predictions it may know.
        known: whether it reads a token of the text that is not to be doubted: neither a mask nor
            a random token, and no kept one either, since the model cannot tell these apart.
        sees: for each key that it has a score for, whether it sees it. The keys are the first M
            entries; the masked sentence has no scores for content.
    """

    group: Group
    position: int
    reads: str
    seen_as: str
    time: int
    known: bool
    sees: tuple[bool, ...]


@dataclass(frozen=True)
class Prediction:
    """A predicted token.

    Attributes:
        number: in the prediction order, from 1.
        position: in the sentence.
        entry: the entry that predicts it.
        token: what is right.
        tokens_seen: how many tokens of the text the entry sees (`Entry.known`).
        positions_seen: at how many positions it sees anything.
        answer: of the model; an empty one without a model.
    """

    number: int
    position: int
    entry: int
    token: str
    tokens_seen: int
    positions_seen: int
    answer: Answer


@dataclass(frozen=True)
class Objective:
    """A sentence under one of the three objectives.

    `tokens` and `positions` are the shares that an average prediction sees; `bits` is the mean.
    """

    name: str
    entries: tuple[Entry, ...]
    predictions: tuple[Prediction, ...]
    tokens: float
    positions: float
    bits: float | None

    @property
    def keys(self) -> tuple[Entry, ...]:
        """The entries that can be seen."""
        return self.entries[: len(self.entries[-1].sees)]

    def seen_by(self, entry: int) -> list[Entry | None]:
        """Return the key that an entry sees at each position of the sentence; None for nothing."""
        seen = {key.position: key for key in _seen(self.entries, entry)}
        return [seen.get(i) for i in range(1 + max(key.position for key in self.keys))]


@dataclass(frozen=True)
class Explanation:
    """All that is drawn.

    Attributes:
        sentence: as it was given.
        about: a line each about the tokenizer, the model, and what the masks depend on.
        input_mode: the objective that was asked for; it is shown first.
        tokens: of the sentence, with `<s>` and `</s>`.
        buckets: the relative position bucket of each distance (key position - query position),
            from -(L - 1) to L - 1; empty if the model has none.
        objectives: by input mode.
    """

    sentence: str
    about: tuple[str, ...]
    input_mode: InputMode
    tokens: tuple[Token, ...]
    buckets: tuple[int, ...]
    objectives: dict[InputMode, Objective]

    @property
    def shown(self) -> Objective:
        """The objective that was asked for."""
        return self.objectives[self.input_mode]

    def bucket(self, query: int, key: int) -> int:
        """Return the relative position bucket of two positions, if the model has buckets."""
        return self.buckets[key - query + len(self.tokens) - 1]


@dataclass(frozen=True)
class _ByHand(DataCollatorForMaskedPermutedLanguageModeling):
    """The collator of training, but the predicted positions may be given."""

    chosen: tuple[int, ...] = ()

    def _choose(self, *drawn: Any) -> masking.Ints:
        return np.array([self.chosen]) if self.chosen else super()._choose(*drawn)


def explain(
    text: str,
    tokenizer: PreTrainedTokenizerFast,
    settings: ObjectiveConfig,
    *,
    predict: str | None = None,
    seed: int = 12345,
    about: Sequence[str] = (),
    asked: Asked | None = None,
) -> Explanation:
    """Explain a sentence.

    Args:
        text: the sentence.
        tokenizer: of the model.
        settings: what is predicted, and how it is corrupted; `input_mode` is what is shown first.
        predict: the words to predict, in their order, separated by commas; None for a random
            choice, the one that training would make for the first sequence of its first epoch.
        seed: of the masks.
        about: lines about tokenizer and model.
        asked: the model; without one, the numbers are MPNet-base's.

    Raises:
        ConfigError: nothing to predict, too long, or an unknown word in `predict`.
    """
    config = ModelConfig() if asked is None else asked.model.config
    sentence = Sentence(text, tokenizer)
    _check_length(sentence, config)
    collator = _ByHand(
        sentence.vocabulary,
        settings,
        # Then P is what this sentence predicts, and no slot is empty.
        max_tokens=int(sentence.predictable_L.sum()) + 2,
        seed=seed,
        chosen=() if predict is None else tuple(sentence.positions_of(predict)),
    )
    objectives: dict[InputMode, Objective] = {}
    batches: dict[InputMode, Batch] = {}
    for mode in get_args(InputMode):
        with_mode = replace(collator, objective=replace(settings, input_mode=mode))
        sequence = NumberedSequence(sentence.ids_L, epoch=0, index=0)
        batches[mode] = with_mode([sequence])
        mask_id = sentence.vocabulary.mask_id
        objectives[mode] = objective_of(mode, batches[mode], sentence.label, mask_id, asked)
    predicted = len(objectives["mpnet"].predictions)
    masks = f"{len(sentence.ids_L)} tokens, {predicted} of them predicted; seed {seed}"
    return Explanation(
        sentence=text,
        about=(*about, masks),
        input_mode=settings.input_mode,
        tokens=_tokens(sentence, batches["mpnet"]),
        buckets=_buckets(len(sentence.ids_L), config),
        objectives=objectives,
    )


def _check_length(sentence: Sentence, config: ModelConfig) -> None:
    length = len(sentence.ids_L)
    most = min(MAX_TOKENS, config.max_positions)
    if length > most:
        whose = "of the checkpoint" if config.max_positions < MAX_TOKENS else "that can be drawn"
        raise ConfigError(
            f"the sentence has {length} tokens with <s> and </s>; expected at most {most}, the "
            f"number {whose}; give a shorter one"
        )
    if not sentence.predictable_L.any():
        raise ConfigError(
            "the sentence has no token that could be predicted: it is blank, or the tokenizer "
            "knows none of its words; give another one, or another --tokenizer-name"
        )


def _tokens(sentence: Sentence, batch: Batch) -> tuple[Token, ...]:
    ranks = _ranks(batch)
    tokens = []
    for position, reads in enumerate(batch.input_ids[0].tolist()):
        token = int(sentence.ids_L[position])
        kind: Kind = ""
        if position in ranks:
            # A random token may be the token itself, by chance; then it is the same as a kept one.
            kind = "kept" if reads == token else "random"
            kind = "mask" if reads == sentence.vocabulary.mask_id else kind
        word, rank = sentence.words[position], ranks.get(position, 0)
        tokens.append(Token(sentence.label(token), word, rank, kind, sentence.label(reads)))
    return tuple(tokens)


def _buckets(length: int, config: ModelConfig) -> tuple[int, ...]:
    num_buckets = config.relative_attention_num_buckets
    if num_buckets == 0:
        return ()
    distances = torch.arange(1 - length, length)
    longest = config.relative_attention_max_distance
    return tuple(relative_position_bucket(distances, num_buckets, longest).tolist())


def _entries(mode: InputMode, batch: Batch, mask_id: int) -> tuple[Entries, list[Group]]:
    """Return the entries of a batch of one sentence, and the group of each."""
    slots = batch.input_ids, batch.predicted_positions, batch.predicted_ids
    length, predicted = batch.input_ids.shape[1], batch.predicted_ids.shape[1]
    sentence: list[Group] = ["sentence"] * length
    queries: list[Group] = ["query"] * predicted
    match mode:
        case "mpnet":
            content: list[Group] = ["content"] * predicted
            return mpnet_entries(*slots), [*sentence, *content, *queries]
        case "mlm":
            return mlm_entries(*slots), sentence
        case "plm":
            content = ["content"] * length
            return plm_entries(*slots, mask_token_id=mask_id), [*content, *queries]


def _blocks(entries: Entries) -> Iterator[tuple[int, list[bool]]]:
    """Yield the time of each entry, and which keys it sees, of those that it has a score for."""
    for block in entries.blocks:
        if block.visibility is None:
            yield from [(0, [True] * block.key_positions.shape[1])] * block.query_positions.shape[1]
        else:
            times, sees = block.visibility.tau[0], block.visibility.matrix()[0]
            yield from zip(times.tolist(), sees.tolist(), strict=True)


def objective_of(
    mode: InputMode,
    batch: Batch,
    label: Callable[[int], str],
    mask_id: int,
    asked: Asked | None = None,
) -> Objective:
    """Write down what the network gets for a batch of one sentence; `label` names the tokens."""
    tensors, groups = _entries(mode, batch, mask_id)
    ranks = _ranks(batch)
    columns = (
        groups,
        tensors.position_ids.expand_as(tensors.input_ids)[0].tolist(),
        tensors.input_ids[0].tolist(),
        _blocks(tensors),
    )
    entries = []
    for group, position, token, (time, sees) in zip(*columns, strict=True):
        reads = label(token)
        corrupted = group == "sentence" and position in ranks
        seen_as = f"{reads}?" if corrupted and token != mask_id else reads
        known = group != "query" and not corrupted
        entries.append(Entry(group, position, reads, seen_as, time, known, tuple(sees)))

    right = batch.predicted_ids[0].tolist()
    answers = [Answer()] * len(right) if asked is None else asked(tensors, right, label)
    assert tensors.loss_entries is not None
    predictions: list[Prediction] = []
    for entry, token, answer in zip(tensors.loss_entries[0].tolist(), right, answers, strict=True):
        seen = _seen(entries, entry)
        predictions.append(
            Prediction(
                number=len(predictions) + 1,
                position=entries[entry].position,
                entry=entry,
                token=label(token),
                tokens_seen=sum(key.known for key in seen),
                positions_seen=len({key.position for key in seen}),
                answer=answer,
            )
        )
    length = batch.input_ids.shape[1]
    bits = [answer.bits for answer in answers if answer.bits is not None]
    return Objective(
        NAMES[mode],
        tuple(entries),
        tuple(predictions),
        tokens=fmean(each.tokens_seen for each in predictions) / length,
        positions=fmean(each.positions_seen for each in predictions) / length,
        bits=fmean(bits) if bits else None,
    )


def _seen(entries: Sequence[Entry], entry: int) -> list[Entry]:
    """Return the keys that an entry sees."""
    return [key for key, sees in zip(entries, entries[entry].sees, strict=False) if sees]


def _ranks(batch: Batch) -> dict[int, int]:
    """Return the place in the prediction order of each predicted position."""
    return {position: i + 1 for i, position in enumerate(batch.predicted_positions[0].tolist())}
