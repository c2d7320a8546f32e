"""Three masked words of the validation text, which the model guesses at each evaluation.

Bits per token say how good a model is, a guessed word what that means. The sentences are the same
at each evaluation and in each start of a run: one from the middle of each third of the text. In it
the longest word is masked that is a single token, has text on both sides, and is frequent in the
training text. Long words are mostly content words.

The model sees the mask and all other tokens, as BERT does. All ranks compute the guesses, because a
sharded network needs them all; rank 0 shows them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import Ids, Vocabulary
from annotated_mpnet.runs.texts import Text
from annotated_mpnet.tracking.guesses import Guess
from annotated_mpnet.training.trainer import Trainer

SENTENCES = 3
OFTEN = 100
"""Occurrences in the training text that make a word frequent."""

BEFORE, AFTER = 32, 20
"""Characters that are shown on either side of the word, at most."""


@dataclass(frozen=True)
class MaskedWord:
    """A sentence, and the position of the token in it that is masked."""

    ids_L: Ids
    place: int


def choose_words(text: Text) -> list[MaskedWord]:
    """Return the words to mask; fewer where the text is short or has no such word."""
    sequences = text.valid
    if sequences is None:
        return []
    counts_V = text.training_counts
    middles = {(2 * part + 1) * len(sequences) // (2 * SENTENCES) for part in range(SENTENCES)}
    chosen = []
    for ids_L in sequences.take(np.array(sorted(middles), dtype=np.int64)):
        ids_L = _longest_document(ids_L, text.vocabulary)
        places = list(_single_tokens(ids_L, text.vocabulary))
        # Preferred: inside of the sentence, and known from training. A name is often neither.
        inner = [place for place in places if len(ids_L) <= 4 * place < 3 * len(ids_L)]
        known = [place for place in inner if counts_V is None or counts_V[ids_L[place]] >= OFTEN]
        if best := known or inner or places:
            # The first one, where several are as long.
            lengths = [_length(text.tokenizer, int(ids_L[place])) for place in best]
            chosen.append(MaskedWord(ids_L, best[int(np.argmax(lengths))]))
    return chosen


def _longest_document(ids_L: Ids, vocabulary: Vocabulary) -> Ids:
    """Return the longest part of a sequence without a special token, between `<s>` and `</s>`."""
    is_end = np.isin(ids_L, (vocabulary.cls_id, vocabulary.sep_id))
    parts = [
        part[~np.isin(part, (vocabulary.cls_id, vocabulary.sep_id))]
        for part in np.split(ids_L, np.flatnonzero(is_end))
    ]
    return np.concatenate([[vocabulary.cls_id], max(parts, key=len), [vocabulary.sep_id]])


def _single_tokens(ids_L: Ids, vocabulary: Vocabulary) -> Iterator[int]:
    """Yield the positions of tokens that are a whole word."""
    begins_L = vocabulary.begins_word(ids_L[None])[0]
    for place in range(1, len(ids_L) - 1):
        ends = begins_L[place + 1] or place + 2 == len(ids_L)
        if begins_L[place] and ends and not vocabulary.is_special_V[ids_L[place]]:
            yield place


def guess_words(trainer: Trainer, words: list[MaskedWord], text: Text) -> list[Guess]:
    """Let the model guess the words; called by all ranks."""
    guesses = []
    for each in words:
        place, right = each.place, int(each.ids_L[each.place])
        ids_1L = torch.from_numpy(each.ids_L.astype(np.int64))[None]
        # In `plm` a predicted token is hidden by the order, not by a mask.
        if trainer.input_mode != "plm":
            ids_1L[0, place] = text.vocabulary.mask_id
        batch = Batch(
            ids_1L, torch.tensor([[place]]), torch.tensor([[right]]), None, len(each.ids_L), 1
        )
        probability_V = trainer.logits(batch)[0, 0].softmax(0)
        best = probability_V.topk(3)
        before = _decoded(text.tokenizer, each.ids_L[1:place])
        after = _decoded(text.tokenizer, each.ids_L[place + 1 : -1])
        guesses.append(
            Guess(
                before=shortened(before[::-1], BEFORE)[::-1],
                word=_decoded(text.tokenizer, [right]),
                after=shortened(after, AFTER),
                probability=float(probability_V[right]),
                best=[
                    (_decoded(text.tokenizer, [int(token)]), float(probability))
                    for token, probability in zip(best.indices, best.values, strict=True)
                ],
            )
        )
    return guesses


def shortened(text: str, most: int) -> str:
    """Cut a text after a word, or where a word has no end in sight.

    >>> shortened("the cruel reply", 11), shortened("the cruel", 11), shortened("x" * 9, 4)
    ('the cruel', 'the cruel', 'xxxx')
    """
    if len(text) <= most:
        return text
    return text[: most + 1].rpartition(" ")[0] or text[:most]


def _length(tokenizer: PreTrainedTokenizerFast, token: int) -> int:
    word = _decoded(tokenizer, [token])
    return len(word) if word.isalpha() else 0


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: Ids | list[int]) -> str:
    return " ".join(str(tokenizer.decode(ids)).split())
