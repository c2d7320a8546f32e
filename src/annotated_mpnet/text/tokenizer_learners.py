"""The three ways to learn pieces and to read text, with the library `tokenizers`.

`learn_tokenizer.py` says how they differ. Each returns a backend that holds the special tokens of
the beginning and all pieces; the mask comes after them.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from datasets.utils import are_progress_bars_disabled
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from annotated_mpnet.settings.commands import TokenizerModel

LEADING = ("<s>", "<pad>", "</s>", "<unk>")
"""The first ids, in the order of fairseq's dictionary."""

MASK = "<mask>"
"""The last id: fairseq appends the mask after the words of its dictionary."""

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
"""How a unigram model spells a letter that it has no piece for."""

LONGEST_WORD = 100
"""Letters. WordPiece's search for the longest known piece takes quadratic time."""

WORDS = (
    r"['’](?:s|t|re|ve|m|ll|d)(?!\p{L})| ?[\p{L}\p{M}JOINERS]+| ?\p{N}+"
    r"| ?[^\s\p{L}\p{M}\p{N}JOINERS]+|\s+(?!\S)|\s+"
).replace("JOINERS", "\u200c\u200d")
"""GPT-2's pattern, with the marks and joiners that words of many scripts contain."""

ACCENTS = r"(?<=[\p{Latin}\p{Greek}])[\u0300-\u036f]+"

LETTERS_SHARE = {"wordpiece": 4, "unigram": 2}
"""A quarter of a WordPiece vocabulary is for letters. Each takes two places, `a` and `##a`, so half
is left for words, even in Chinese; rarer letters become unknown. With unigram each takes one."""

COVERED = 0.9995
"""Share of the letters of the text that get a piece in a unigram model, as in SentencePiece. The
rest are spelled in bytes, and are mostly other languages' and emoji."""

LEARNED_FROM = 20_000_000
"""Letters that a unigram model is learned from, in documents spread over the text: in text without
spaces a million takes half a minute."""

NEVER = -1e4
"""Log-probability of the special tokens and bytes in a unigram model: text that says `<s>` is
spelled in letters. Bytes are taken where nothing else fits, whatever their probability."""


def normalizer_for(
    model: TokenizerModel, lowercase: bool, strip_accents: bool
) -> normalizers.Normalizer | None:
    """Return what is done to text before it is split; None for nothing."""
    steps: list[normalizers.Normalizer] = []
    if model == "wordpiece":
        steps += [normalizers.BertNormalizer(strip_accents=False, lowercase=lowercase)]
    elif lowercase:
        steps += [normalizers.Lowercase()]
    if strip_accents:
        accents = normalizers.Replace(Regex(ACCENTS), "")
        steps += [normalizers.NFD(), accents, normalizers.NFC()]
    return normalizers.Sequence(steps) if steps else None


def pre_tokenizer_for(model: TokenizerModel) -> pre_tokenizers.PreTokenizer:
    """Return what splits text into the parts that pieces cannot cross."""
    if model == "wordpiece":
        parts = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated")
        return pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), parts])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    letters: pre_tokenizers.PreTokenizer
    if model == "bpe":
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        letters = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return pre_tokenizers.Sequence([words, letters])


def learn_wordpiece(
    reader: Tokenizer,
    documents: Iterator[str],
    vocab_size: int,
    letters: Counter[str],
) -> Tokenizer:
    """Merge letters; words of the most frequent ones."""
    alphabet = sorted([*letters][: vocab_size // LETTERS_SHARE["wordpiece"]])
    reader.model = models.WordPiece(unk_token="<unk>")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - 1,  # one is left for the mask
        # Left alone, the trainer numbers `##a`, `##b`, ... in the order of a hash table. They are
        # called special tokens because those keep their order.
        special_tokens=[*LEADING, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=_shows_progress(),
    )
    reader.train_from_iterator(documents, trainer)
    # Only the learner's vocabulary is of use: it took the letters for special tokens.
    vocabulary = reader.get_vocab(with_added_tokens=True)
    model = models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=LONGEST_WORD)
    return _with_parts_of(reader, model, decoders.WordPiece())


def learn_bpe(reader: Tokenizer, documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """Merge bytes."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[*LEADING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=_shows_progress(),
    )
    reader.train_from_iterator(documents, trainer)
    return _with_parts_of(reader, reader.model, decoders.ByteLevel())


def learn_unigram(
    reader: Tokenizer,
    documents: Iterator[str],
    vocab_size: int,
    letters: Counter[str],
) -> Tokenizer:
    """Take all frequent strings, and drop those that the text needs least."""
    wanted = vocab_size - len(LEADING) - len(BYTE_PIECES) - 1
    alphabet = _covering(letters, wanted // LETTERS_SHARE["unigram"])
    uncovered = re.compile(f"[^{re.escape(''.join(alphabet))}]+")
    read = reader.normalizer.normalize_str if reader.normalizer else str
    learner = Tokenizer(models.Unigram())
    # The trainer takes candidates for pieces that occur in two different words. Were punctuation
    # split off, `said` would be one word, and no candidate. So it sees `said,` and `said."` and
    # learns more pieces than are wanted; those that text is never split into are left out.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated"),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=wanted * 3 // 2,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        show_progress=_shows_progress(),
    )
    every = -(-letters.total() // LEARNED_FROM)
    text = (uncovered.sub(" ", read(each)) for each in islice(documents, 0, None, every))
    learner.train_from_iterator(text, trainer)
    # Its threads add up in another order each time: round, and order what is equal.
    learned = {
        piece: round(score, 6)
        for piece, score in json.loads(learner.to_str())["model"]["vocab"]
        if len(reader.pre_tokenizer.pre_tokenize_str(piece.replace("▁", " "))) == 1
    }
    spelled = dict.fromkeys([*alphabet, "▁"], min(learned.values()))
    pieces = sorted((spelled | learned).items(), key=lambda each: (-each[1], each[0]))
    longer = [each for each in pieces if each[0] not in spelled]
    kept = {*spelled, *dict(longer[: wanted - len(spelled)])}
    model = models.Unigram(
        [(piece, NEVER) for piece in (*LEADING, *BYTE_PIECES)]
        + [each for each in pieces if each[0] in kept],
        unk_id=LEADING.index("<unk>"),
        byte_fallback=True,
    )
    decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return _with_parts_of(reader, model, decoder)


def _covering(letters: Counter[str], most: int) -> list[str]:
    """Return the most frequent letters that cover the text, and those that spell `<s>`, `<0x0A>`.

    >>> "".join(_covering(Counter({"e": 9000, "é": 990, "ж": 9, "猫": 1}), most=3))
    '/0123456789<>ABCDEFadekmnpsuxéж'
    """
    seen, total = 0, letters.total()
    chosen = {*"".join((*LEADING, MASK, *BYTE_PIECES))}
    for letter, count in [*letters.items()][:most]:
        if seen >= COVERED * total:
            break
        chosen.add(letter)
        seen += count
    return sorted(chosen)


def _with_parts_of(reader: Tokenizer, model: models.Model, decoder: decoders.Decoder) -> Tokenizer:
    """Return a tokenizer that reads text as another one does."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = reader.pre_tokenizer
    if reader.normalizer is not None:
        backend.normalizer = reader.normalizer
    backend.decoder = decoder
    return backend


def _shows_progress() -> bool:
    return sys.stderr.isatty() and not are_progress_bars_disabled()
