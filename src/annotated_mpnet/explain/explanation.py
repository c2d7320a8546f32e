"""Compute what the model is given for a sentence, and what each entry of it may see.

Nothing here decides anything: `mpnet/collator.py` chooses and corrupts, `mpnet/two_stream.py` makes
the entries and says who sees whom, and this module writes down the result in plain words and
numbers. All three objectives get the same predicted tokens in the same order, so they can be
compared.

>>> tokenizer = word_tokenizer("The cat sat on the mat.")
>>> explanation = explain(
...     "The cat sat on the mat.", tokenizer, ObjectiveConfig(rand_prob=0, keep_prob=0),
...     predict="mat, sat")
>>> [token.reads for token in explanation.tokens]
['<s>', 'The', 'cat', '<mask>', 'on', 'the', '<mask>', '.', '</s>']
>>> for name, objective in explanation.objectives.items():
...     for each in objective.predictions:
...         print(name, each.number, objective.seen_by(each.entry))
mpnet 1 ['<s>', 'The', 'cat', '<mask>', 'on', 'the', '<mask>', '.', '</s>']
mpnet 2 ['<s>', 'The', 'cat', '<mask>', 'on', 'the', 'mat', '.', '</s>']
mlm 1 ['<s>', 'The', 'cat', '<mask>', 'on', 'the', '<mask>', '.', '</s>']
mlm 2 ['<s>', 'The', 'cat', '<mask>', 'on', 'the', '<mask>', '.', '</s>']
plm 1 ['<s>', 'The', 'cat', None, 'on', 'the', None, '.', '</s>']
plm 2 ['<s>', 'The', 'cat', None, 'on', 'the', 'mat', '.', '</s>']

    L sequence length    P predicted tokens    E entries    M keys    Q queries
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError, shown
from annotated_mpnet.mpnet import masking
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    NumberedSequence,
)
from annotated_mpnet.mpnet.config import InputMode, ModelConfig, ObjectiveConfig
from annotated_mpnet.mpnet.positions import relative_position_bucket
from annotated_mpnet.mpnet.two_stream import Entries, mlm_entries, mpnet_entries, plm_entries
from annotated_mpnet.text.tokenization import Tokenise
from annotated_mpnet.text.tokenizer import BYTES, vocabulary_of

MAX_TOKENS = 128
"""A picture of more cannot be read, and a page with all attention weights would take megabytes."""

SPARE_WORDS = "house tree blue slowly seven river green paper runs bird cold stone music early open"
"""What `word_tokenizer` can put in place of a predicted token, next to the sentence's own words."""

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

    def seen_by(self, entry: int) -> list[str | None]:
        """Return what an entry sees at each position of the sentence; None for nothing."""
        seen = {key.position: key.reads for key in self.keys_of(self.entries[entry])}
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


def word_tokenizer(sentence: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that needs no file: each word and punctuation mark is one token.

    Words are cut as BERT's and MPNet's tokenizers cut them before they look for pieces.

    >>> word_tokenizer("Don't!").tokenize("Don't!")
    ['Don', "'", 't', '!']
    """
    normalizer = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence))]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *words, *SPARE_WORDS.split(), "<mask>"]
    numbers = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


class _Sentence:
    """A sentence as tokens, and what each id is called."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.vocabulary = vocabulary_of(tokenizer)
        # As training reads text: a `<mask>` in it is text.
        reader = Tokenise(tokenizer)
        encoding = reader.backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        ids[reader.is_special_V[ids]] = reader.unk_id
        self.ids_L = np.array([self.vocabulary.cls_id, *ids, self.vocabulary.sep_id])
        self._backend = reader.backend
        self._is_byte_level = '"ByteLevel"' in self._backend.to_str()
        self._text = text
        self._spans = [(0, 0), *encoding.offsets, (0, 0)]
        self.predictable_L = ~self.vocabulary.is_special_V[self.ids_L]
        starts_1L = self.vocabulary.begins_word(self.ids_L[None])
        self.words = masking.find_words(starts_1L, self.predictable_L[None])[0].tolist()

    def label(self, token: int) -> str:
        """Return a token as its tokenizer writes it; byte-level pieces are decoded.

        An id without a token, which a model may have a row for, is shown as its number.
        """
        piece = self._backend.id_to_token(token)
        if piece is None:
            return f"[{token}]"
        if self._is_byte_level:
            said = b"".join(BYTES.get(letter, letter.encode()) for letter in piece)
            return said.decode(errors="replace").strip() or piece
        return piece

    def positions_of(self, predict: str) -> list[int]:
        """Return the positions of words, in their order; of a number, the token there.

        A word that is named twice means two occurrences.
        """
        places: dict[int, list[int]] = {}
        for position, word in enumerate(self.words):
            if word >= 0:
                places.setdefault(word, []).append(position)
        written = {
            word: self._text[self._spans[these[0]][0] : self._spans[these[-1]][1]].strip()
            for word, these in places.items()
        }
        chosen: list[int] = []
        for name in (each.strip() for each in predict.split(",")):
            same = [word for word, text in written.items() if text == name]
            same += [word for word, text in written.items() if text.lower() == name.lower()]
            wanted = [places[word] for word in same]
            if not same and name.isdecimal() and any(int(name) in each for each in places.values()):
                wanted = [[int(name)]]
            free = [each for each in wanted if not set(each) & set(chosen)]
            if not free:
                found = "occurs less often in the sentence" if wanted else "is not in the sentence"
                can = ", ".join(dict.fromkeys(map(shown, written.values())))
                raise ConfigError(
                    f"--predict has {shown(name)}, which {found}; expected words of it, "
                    f"separated by commas, or positions from 1: {can}"[:500]
                )
            chosen += free[0]
        return chosen


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
    sentence = _Sentence(text, tokenizer)
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


def _check_length(sentence: _Sentence, config: ModelConfig) -> None:
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


def _tokens(sentence: _Sentence, batch: Batch) -> tuple[Token, ...]:
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


def _sees(entries: Entries) -> list[list[bool]]:
    """Return which keys each entry sees, of those that it has a score for."""
    sees: list[list[bool]] = []
    for block in entries.blocks:
        if block.visibility is None:
            sees += [[True] * block.key_positions.shape[1]] * block.query_positions.shape[1]
        else:
            sees += block.visibility.matrix()[0].tolist()
    return sees


def _times(entries: Entries) -> list[int]:
    times: list[int] = []
    for block in entries.blocks:
        if block.visibility is None:
            times += [0] * block.query_positions.shape[1]
        else:
            times += block.visibility.tau[0].tolist()
    return times


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
        _times(tensors),
        _sees(tensors),
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
        for group, position, token, time, sees in zip(*columns, strict=True)
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
