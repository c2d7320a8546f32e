"""What `probe.py` asks: pairs of sentences from STS-B, and two tasks made from Jane Austen.

Both tasks need no labels but the books themselves:

    novel    which of the six novels is this paragraph from? Every name is replaced by an X, or
             "Emma" and "Darcy" would answer.
    order    two sentences that follow each other in a paragraph: in this order, or swapped?

The examples of a chapter are either all trained on or all tested on.
"""

import csv
import lzma
import random
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from annotated_mpnet.demo.corpus import TEST, TRAIN, VALID
from annotated_mpnet.errors import DataError

NOVELS = (*TRAIN, VALID, TEST)
MIN_WORDS = 20
"""Of a paragraph whose novel is asked for, and of both sentences whose order is."""
ALIKE = 4.0
"""The score from which two sentences of STS-B count as a pair to fine-tune on."""
SHUFFLE = 1
"""Seed of the choice of examples: all models are asked the same."""

NAME = re.compile(r"\b[A-Z]\w+")
# A full stop, not that of a title, then a space and a capital.
BETWEEN_SENTENCES = re.compile(
    r"""(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?:(?<=[.!?])|(?<=[.!?]["”]))\s+(?=["“]?[A-Z])"""
)


class Similarity(NamedTuple):
    """Pairs of sentences, and how alike people found them, from 0 to 5."""

    first: list[str]
    second: list[str]
    score: list[float]


class Examples(NamedTuple):
    """Texts to classify.

    Attributes:
        texts: one for each example.
        labels: the right answers.
        chapters: examples with the same number are from the same chapter.
    """

    texts: list[str]
    labels: list[int]
    chapters: list[int]


def read_similarity(directory: Path, split: str, limit: int) -> Similarity:
    """Return the first pairs of a split of STS-B, from a file whose name ends in `en-SPLIT.csv`.

    Raises:
        DataError: there is no such file, or a line is not two sentences and a score.
    """
    files = sorted(directory.glob(f"*en-{split}.csv"))
    if not files:
        raise DataError(
            f"--stsb is {directory}, which holds no file *en-{split}.csv; expected the English "
            "files of stsb-multi-mt: sentence, sentence and score in each line"
        )
    found = Similarity([], [], [])
    with files[0].open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        for line in reader:
            try:
                first, second, score = line[0], line[1], float(line[2])
            except (IndexError, ValueError):
                raise DataError(
                    f"{files[0]}, line {reader.line_num}: {line!r:.80}; expected two sentences "
                    "and a score"
                ) from None
            for column, value in zip(found, (first, second, score), strict=True):
                column.append(value)
            if len(found.score) == limit:
                break
    if len(found.score) < 2:
        raise DataError(f"{files[0]} holds {len(found.score)} pairs; expected at least 2")
    return found


def alike(pairs: Similarity, limit: int) -> tuple[list[str], list[str]]:
    """Return the pairs that mean the same.

    >>> alike(Similarity(["a", "b"], ["A", "c"], [5.0, 1.0]), 9)
    (['a'], ['A'])
    """
    kept = [(first, second) for first, second, score in zip(*pairs, strict=True) if score >= ALIKE]
    return [first for first, _ in kept[:limit]], [second for _, second in kept[:limit]]


def novel_examples(limit: int) -> Examples:
    """Return equally many paragraphs of each novel, without names."""
    novels = [list(paragraphs(read_novel(name))) for name in NOVELS]
    common = {word for novel in novels for _, text in novel for word in re.findall(r"\b\w+", text)}
    chosen: list[tuple[str, int, int]] = []
    for label, novel in enumerate(novels):
        long = [(chapter, text) for chapter, text in novel if len(text.split()) >= MIN_WORDS]
        random.Random(SHUFFLE).shuffle(long)
        chosen += [
            (without_names(text, common), label, 1000 * label + chapter)
            for chapter, text in long[: max(2, limit // len(novels))]
        ]
    return _examples(chosen)


def order_examples(limit: int) -> Examples:
    """Return two sentences of each of some paragraphs, every other time swapped (label 1)."""
    pairs: list[tuple[str, str, int]] = []
    for novel, name in enumerate(NOVELS):
        for chapter, text in paragraphs(read_novel(name)):
            sentences = BETWEEN_SENTENCES.split(text)
            # The last two: the first sentence of a paragraph often tells that it is the first.
            if len(sentences) > 2 and len(" ".join(sentences[-2:]).split()) >= MIN_WORDS:
                pairs.append((sentences[-2], sentences[-1], 1000 * novel + chapter))
    random.Random(SHUFFLE).shuffle(pairs)
    return _examples(
        [
            (f"{second} {first}" if number % 2 else f"{first} {second}", number % 2, chapter)
            for number, (first, second, chapter) in enumerate(pairs[:limit])
        ]
    )


def without_names(text: str, common: set[str]) -> str:
    """Replace each capitalised word that is common nowhere in small letters.

    >>> without_names("The Emma of Mr. Knightley. Handsome!", {"the", "of", "handsome"})
    'The X of Mr. X. Handsome!'
    """
    titles = {"mr", "mrs"}
    return NAME.sub(lambda m: m[0] if m[0].lower() in common | titles else "X", text)


def read_novel(name: str) -> list[str]:
    """Return the paragraphs of a novel that comes with the package, headings included."""
    packed = resources.files("annotated_mpnet.demo") / "austen" / f"{name}.txt.xz"
    return lzma.decompress(packed.read_bytes()).decode().splitlines()


def paragraphs(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield each paragraph with the number of its chapter.

    >>> list(paragraphs(["EMMA", "CHAPTER I", "Emma was rich.", "Chapter 2", "She was clever."]))
    [(1, 'Emma was rich.'), (2, 'She was clever.')]
    """
    chapter = 0
    for line in lines:
        if re.match(r"chapter\b", line, re.IGNORECASE) and len(line.split()) == 2:
            chapter += 1
        elif chapter > 0:
            yield chapter, line


def _examples(chosen: list[tuple[str, int, int]]) -> Examples:
    texts, labels, chapters = zip(*chosen, strict=True)
    return Examples(list(texts), list(labels), list(chapters))
