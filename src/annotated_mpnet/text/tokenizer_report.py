"""How well a tokenizer fits a text: tokens per word, and what it does not know.

A word here is what white space separates, so the numbers of different tokenizers can be compared.
In text without spaces there are no such words, and characters per token must do.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from datasets.utils import tqdm
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.text.tokenizer import WITHOUT_SPACES
from annotated_mpnet.text.tokenizer_learners import BYTE_PIECES

MEASURED = 1000
"""Documents that are tokenized to measure the result, spread over the text."""

MUCH_UNKNOWN = 0.01
"""From this share of the text on, the user is warned."""

MUCH_IN_BYTES = 0.05
"""From this share of the tokens on, the user is warned."""

MANY_TOKENS = 3.0
"""Per word. Good vocabularies have 1.2 (English) to 2 (Turkish, Finnish)."""

MANY_WITHOUT_SPACES = 0.2
"""Share of the characters from which on the text counts as written without spaces."""


@dataclass
class Fit:
    """Counts over a text; how many letters a tokenizer leaves unknown, and how many it spells."""

    words: int = 0
    characters: int = 0
    """White space left out."""
    without_spaces: int = 0
    """Characters of scripts that have none between words."""
    tokens: int = 0
    unknown: int = 0
    """Characters that became the unknown token."""
    in_bytes: int | None = None
    """Tokens that are a byte of a letter without a piece; None if the tokenizer has none."""

    @property
    def has_words(self) -> bool:
        """Whether the text has spaces between words."""
        return self.without_spaces < MANY_WITHOUT_SPACES * self.characters

    @property
    def share_unknown(self) -> float:
        """Of the characters."""
        return self.unknown / max(1, self.characters)

    def __str__(self) -> str:
        per_word = f"{self.tokens / self.words:.2f} tokens per word, " if self.has_words else ""
        per_token = f"{self.characters / self.tokens:.1f} characters per token, "
        if self.in_bytes is None:
            spelled = ""
        else:
            spelled = f"{self.in_bytes / self.tokens:.2%} of the tokens a byte of a rare letter, "
        return f"{per_word}{per_token}{spelled}{self.share_unknown:.2%} unknown"

    def warnings(self, vocab_size: int) -> list[str]:
        """Return what the user should know, and do about it."""
        found = []
        if self.share_unknown >= MUCH_UNKNOWN:
            found.append(
                f"{self.share_unknown:.1%} of the text becomes <unk>: it has more different "
                f"letters than --vocab-size {vocab_size} has room for; raise --vocab-size, or use "
                "--model unigram or bpe, which spell them in bytes"
            )
        if self.in_bytes is not None and self.in_bytes >= MUCH_IN_BYTES * self.tokens:
            found.append(
                f"{self.in_bytes / self.tokens:.1%} of the tokens spell a letter in bytes: the "
                f"text has more different letters than --vocab-size {vocab_size} has room for; "
                "raise --vocab-size"
            )
        if self.has_words and self.tokens >= MANY_TOKENS * self.words:
            found.append(
                f"{self.tokens / self.words:.1f} tokens per word: words are cut into small pieces; "
                f"raise --vocab-size {vocab_size}, or give more text to learn from"
            )
        return found


def measure(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], number: int) -> Fit:
    """Tokenize some of the documents.

    Args:
        tokenizer: what is measured.
        documents: the text.
        number: how many documents that are.
    """
    vocabulary = tokenizer.get_vocab()
    of_bytes = {vocabulary[piece] for piece in BYTE_PIECES if piece in vocabulary}
    fit = Fit(in_bytes=0 if of_bytes else None)
    bar = tqdm(documents, desc="Measuring", unit=" documents", total=number)
    for document in islice(bar, 0, None, max(1, number // MEASURED)):
        text = document.lstrip()[:4000]
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        words = text.split()
        fit.words += len(words)
        fit.characters += sum(map(len, words))
        fit.without_spaces += len(WITHOUT_SPACES.findall(text))
        fit.tokens += len(encoding)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == tokenizer.unk_token_id:
                fit.unknown += len("".join(text[start:end].split()))
            elif token in of_bytes and not text[start:end].isspace():
                fit.in_bytes = (fit.in_bytes or 0) + 1
    return fit
