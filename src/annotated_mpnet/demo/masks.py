"""Words for the model to guess, chosen by a rule, and its guesses before and after training.

A loss in bits is hard to picture; a guessed word is not. But examples picked by hand prove nothing,
and most masks fall on words of grammar (`the`, `to`, `of`), which are easy. So the demo has a rule:

    in each paragraph of Persuasion that fits into a sequence and has at least 20 tokens,
    mask the longest word in lower case that is a single token and occurs at least 100 times in the
    training text (the first one, where several are as long)

Long words are content words, nearly always: `acquaintance`, `attention`, `happiness`. The model was
never trained on Persuasion. All of these words are counted, and the table shows some of them at
even distances through the novel.

    B batch   L tokens of a sentence   V vocabulary   N gaps
"""

import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from annotated_mpnet.demo.corpus import TEST

LEAST_TOKENS = 20
LEAST_OCCURRENCES = 100
"""In the training text. Words that are seldom there are too much to ask of two minutes."""


@dataclass(frozen=True)
class Gap:
    """A paragraph with a word to guess: the text before it, the word, the text after it."""

    before: str
    word: str
    after: str


@dataclass(frozen=True)
class Guesses:
    """What a model thinks of each of N gaps.

    Attributes:
        rank_N: (N,), the place of the right word among the model's guesses, from 0.
        probability_N: (N,), what the model gives to the right word.
        best_N3: (N, 3), the ids of the three likeliest tokens.
        best_probability_N3: (N, 3), what it gives to them.
    """

    rank_N: torch.Tensor
    probability_N: torch.Tensor
    best_N3: torch.Tensor
    best_probability_N3: torch.Tensor

    def share_within(self, most: int) -> float:
        """Return the share of gaps whose word is among the model's first guesses."""
        return float((self.rank_N < most).float().mean())


def find_gaps(
    tokenizer: PreTrainedTokenizerBase, training_counts_V: np.ndarray, max_tokens: int
) -> list[Gap]:
    """Return the gaps of Persuasion, by the rule above."""
    packed = resources.files("annotated_mpnet.demo") / "austen" / f"{TEST}.txt.xz"
    paragraphs = lzma.decompress(packed.read_bytes()).decode().splitlines()
    vocabulary = tokenizer.get_vocab()
    gaps = []
    for paragraph in paragraphs:
        if not LEAST_TOKENS <= len(tokenizer(paragraph, verbose=False)["input_ids"]) <= max_tokens:
            continue
        known = [
            found
            for found in re.finditer(r"\b[a-z]+\b", paragraph)
            if found[0] in vocabulary
            and training_counts_V[vocabulary[found[0]]] >= LEAST_OCCURRENCES
        ]
        if known:
            longest = max(known, key=lambda found: len(found[0]))
            start, end = longest.span()
            gaps.append(Gap(paragraph[:start], longest[0], paragraph[end:]))
    return gaps


Ask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids (B, L) and attention mask (B, L) to logits (B, L, V)."""


@torch.no_grad()
def guess(ask: Ask, tokenizer: PreTrainedTokenizerBase, gaps: list[Gap]) -> Guesses:
    """Ask a model for all gaps: each paragraph as a plain masked sentence, as BERT is asked."""
    ids_of = tokenizer.get_vocab()
    found = []
    for first in range(0, len(gaps), 64):
        some = gaps[first : first + 64]
        texts = [gap.before + tokenizer.mask_token + gap.after for gap in some]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        ids_BL = encoded["input_ids"]
        # One mask in each paragraph, so the gaps come out in order: (B, V).
        logits_BV = ask(ids_BL, encoded["attention_mask"])[ids_BL == tokenizer.mask_token_id]
        probability_BV = logits_BV.softmax(dim=1)
        right_B1 = torch.tensor([[ids_of[gap.word]] for gap in some])
        right_probability_B1 = probability_BV.gather(1, right_B1)
        rank_B = (probability_BV > right_probability_B1).sum(dim=1)
        best = probability_BV.topk(3, dim=1)
        found.append((rank_B, right_probability_B1[:, 0], best.indices, best.values))
    return Guesses(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def table_of(
    gaps: list[Gap],
    before: Guesses,
    after: Guesses,
    tokenizer: PreTrainedTokenizerBase,
    rows: int = 6,
) -> Table:
    """Return a table of some gaps, evenly spaced, with the three likeliest words of each model."""
    table = Table(title="Words masked in Persuasion, and the guesses", title_justify="left")
    for column in ("passage", "Austen", "before training", "after training"):
        table.add_column(column)
    for number in np.linspace(0, len(gaps) - 1, min(rows, len(gaps))).round().astype(int):
        gap = gaps[number]
        passage = " ".join(["...", *gap.before.split()[-5:], "____", *gap.after.split()[:4], "..."])
        right = f"{gap.word}\n{after.probability_N[number]:.1%}"
        cells = (
            passage,
            right,
            *("\n".join(_best(each, number, tokenizer)) for each in (before, after)),
        )
        table.add_row(*(escape(cell) for cell in cells), end_section=True)
    return table


def _best(guesses: Guesses, number: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the likeliest tokens of a gap, each with its probability."""
    tokens = tokenizer.convert_ids_to_tokens(guesses.best_N3[number].tolist())
    for token, probability in zip(tokens, guesses.best_probability_N3[number], strict=True):
        yield f"{token} {probability:.1%}"
