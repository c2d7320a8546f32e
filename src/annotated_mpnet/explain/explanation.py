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
...         print(name, each.number, " ".join(key.reads if key else "--" for key in seen))
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
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError
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
        rank: of its position, as in `Token`.
        time: how many predictions it may know.
        known: whether it reads a token of the text that is not to be doubted: neither a mask nor
            a random token, and no kept one either, since the model cannot tell these apart.
        sees: for each key that it has a score for, whether it sees it. The keys are the first M
            entries; the masked sentence has no scores for content.
    """

    group: Group
    position: int
    reads: str
    rank: int
    time: int
    known: bool
    sees: tuple[bool, ...]


@dataclass(frozen=True)
class Guess:
    """A token that a model expects, and its probability."""

    token: str
    probability: float


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
        guesses: of the model, the likeliest first; empty without a model.
        bits: -log2 of the probability of the right token; None without a model.
        attention: what the entry attends to, for each layer, head and key, in thousandths.
    """

    number: int
    position: int
    entry: int
    token: str
    tokens_seen: int
    positions_seen: int
    guesses: tuple[Guess, ...] = ()
    bits: float | None = None
    attention: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class Objective:
    """A sentence under one of the three objectives.

    `tokens` and `positions` are the shares that an average prediction sees; `bits` is the mean.
    """

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
        seen = {key.position: key for key in self.keys_of(self.entries[entry])}
        return [seen.get(i) for i in range(1 + max(key.position for key in self.keys))]

    def keys_of(self, entry: Entry) -> list[Entry]:
        """Return the keys that an entry sees."""
        return [key for key, sees in zip(self.keys, entry.sees, strict=False) if sees]


@dataclass(frozen=True)
class Explanation:
    """All that is drawn.

    Attributes:
        sentence: as it was given.
        tokenizer: in words.
        model: the path or name of the checkpoint; None without one.
        notes: what the user should know about the model.
        seed: of the masks.
        input_mode: the objective that was asked for; it is shown first.
        tokens: of the sentence, with `<s>` and `</s>`.
        buckets: the relative position bucket of each distance (key position - query position),
            from -(L - 1) to L - 1; empty if the model has none.
        objectives: by input mode.
    """

    sentence: str
    tokenizer: str
    model: str | None
    notes: tuple[str, ...]
    seed: int
    input_mode: InputMode
    tokens: tuple[Token, ...]
    buckets: tuple[int, ...]
    objectives: dict[InputMode, Objective]

    @property
    def shown(self) -> Objective:
        """The objective that was asked for."""
        return self.objectives[self.input_mode]

    def bucket(self, query: int, key: int) -> int | None:
        """Return the relative position bucket of two positions."""
        return self.buckets[key - query + len(self.tokens) - 1] if self.buckets else None


class Answers(NamedTuple):
    """What a model says to each prediction, as in `Prediction`; a guess is an id here."""

    guesses: Sequence[Sequence[tuple[int, float]]]
    bits: Sequence[float | None]
    attention: Sequence[tuple[tuple[tuple[int, ...], ...], ...]]

    @classmethod
    def none(cls, predictions: int) -> "Answers":
        """Return what no model says."""
        return cls([()] * predictions, [None] * predictions, [()] * predictions)


Ask = Callable[[Entries, list[int]], Answers]
"""Asks a model (`model.py`); gets the entries and the right ids."""


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
    tokenizer_name: str = "",
    model: str | None = None,
    notes: tuple[str, ...] = (),
    config: ModelConfig | None = None,
    ask: Ask | None = None,
) -> Explanation:
    """Explain a sentence.

    Args:
        text: the sentence.
        tokenizer: of the model.
        settings: what is predicted, and how it is corrupted; `input_mode` is what is shown first.
        predict: the words to predict, in their order, separated by commas; None for a random
            choice, the one that training would make for the first sequence of its first epoch.
        seed: of the masks.
        tokenizer_name: in words.
        model: its name.
        notes: about it.
        config: of the model; MPNet-base's without one.
        ask: asks the model.

    Raises:
        ConfigError: nothing to predict, too long, or an unknown word in `predict`.
    """
    config = config or ModelConfig()
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
        objectives[mode] = objective_of(mode, batches[mode], sentence.label, mask_id, ask)
    return Explanation(
        sentence=text,
        tokenizer=tokenizer_name,
        model=model,
        notes=notes,
        seed=seed,
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
    reads_L = batch.input_ids[0].tolist()

    def kind(position: int) -> Kind:
        if position not in ranks:
            return ""
        if reads_L[position] == sentence.vocabulary.mask_id:
            return "mask"
        # A random token may be the token itself, by chance; then it is the same as a kept one.
        return "kept" if reads_L[position] == sentence.ids_L[position] else "random"

    return tuple(
        Token(
            text=sentence.label(int(token)),
            word=sentence.words[position],
            rank=ranks.get(position, 0),
            kind=kind(position),
            reads=sentence.label(reads_L[position]),
        )
        for position, token in enumerate(sentence.ids_L)
    )


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
    ask: Ask | None = None,
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
    entries = tuple(
        Entry(
            group=group,
            position=position,
            reads=label(token),
            rank=ranks.get(position, 0),
            time=time,
            known=group == "content" or (group == "sentence" and position not in ranks),
            sees=tuple(sees),
        )
        for group, position, token, (time, sees) in zip(*columns, strict=True)
    )
    right = batch.predicted_ids[0].tolist()
    assert tensors.loss_entries is not None
    predicting = tensors.loss_entries[0].tolist()
    answers = Answers.none(len(right)) if ask is None else ask(tensors, right)
    whole = Objective(entries, (), 0.0, 0.0, None)
    predictions = tuple(
        Prediction(
            number=number,
            position=entries[entry].position,
            entry=entry,
            token=label(token),
            tokens_seen=sum(key.known for key in whole.keys_of(entries[entry])),
            positions_seen=len({key.position for key in whole.keys_of(entries[entry])}),
            guesses=tuple(Guess(label(each), chance) for each, chance in guesses),
            bits=bits,
            attention=attention,
        )
        for number, (entry, token, guesses, bits, attention) in enumerate(
            zip(predicting, right, *answers, strict=True), start=1
        )
    )
    possible = batch.input_ids.shape[1] * len(predictions)
    bits_known = [each.bits for each in predictions if each.bits is not None]
    return replace(
        whole,
        predictions=predictions,
        tokens=sum(each.tokens_seen for each in predictions) / possible,
        positions=sum(each.positions_seen for each in predictions) / possible,
        bits=sum(bits_known) / len(bits_known) if bits_known else None,
    )


def _ranks(batch: Batch) -> dict[int, int]:
    """Return the place in the prediction order of each predicted position."""
    return {position: i + 1 for i, position in enumerate(batch.predicted_positions[0].tolist())}
