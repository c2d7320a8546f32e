"""Tokenizers of a few dozen pieces, without files."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
TEXT = "the cat sat on the mat. The other cat, an unbelievably tall one, didn't! 12 cats (sat)"
LETTERS = "abcdefghijklmnopqrstuvwxyz<>/.,"


def word_piece(words: tuple[str, ...] = ("tall", "tale", "mask"), **specials: str | None):
    """Like MPNet's: letters spell words that are not in the vocabulary. `mask_token=None` leaves
    out a special token."""
    named = {name: token for name, token in {**SPECIALS, **specials}.items() if token is not None}
    pieces = [*dict.fromkeys(SPECIALS.values())][:4]
    pieces += [*words, *LETTERS, *(f"##{letter}" for letter in LETTERS), "<mask>"]
    backend = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def byte_level() -> PreTrainedTokenizerFast:
    pieces = [*SPECIALS.values(), "Ġ", "u", "n", "Ġu", "Ġun", "b"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "u"), ("Ġu", "n")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Has `<mask>` also as an ordinary piece, like XLM-R's vocabulary."""
    pieces = [(piece, 0.0) for piece in SPECIALS.values()]
    pieces += [("▁", -3.0), ("▁un", -1.0), ("bel", -2.0), ("u", -4.0), ("n", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


def word_level() -> PreTrainedTokenizerFast:
    pieces = [*SPECIALS.values(), "un", "bel", "▁"]
    backend = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


def learned(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one of the three families, trained on a sentence."""
    specials = list(SPECIALS.values())
    if kind == "WordPiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=specials)
    elif kind == "byte-level BPE":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>")
    trainer.show_progress = False
    backend.train_from_iterator([TEXT] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)
