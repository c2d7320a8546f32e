"""A sentence as tokens: cut by a tokenizer, or by `word_tokenizer`, which needs no file."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.errors import ConfigError, shown
from annotated_mpnet.mpnet import masking
from annotated_mpnet.text.tokenization import Tokenise
from annotated_mpnet.text.tokenizer import vocabulary_of

SPARE_WORDS = "house tree blue slowly seven river green paper runs bird cold stone music early open"
"""What `word_tokenizer` can put in place of a predicted token, next to the sentence's own words."""


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


class Sentence:
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
            return decoders.ByteLevel().decode([piece]).strip() or piece
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
