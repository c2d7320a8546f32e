"""Tokenizers of a few dozen pieces, made on the spot."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz<>/.,"


def word_piece(words: tuple[str, ...] = ("tall", "tale", "mask"), **specials: str | None):
    """MPNet's kind: letters spell whatever is no word of the vocabulary. `mask_token=None` leaves
    a special token out."""
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
    """Holds `<mask>` as an ordinary piece too, as XLM-R's vocabulary does."""
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
