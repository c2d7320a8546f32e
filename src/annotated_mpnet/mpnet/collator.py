"""Rows to a batch: padded, masked, and in the model's terms.

Everything about the objective that is random has happened once a batch stands here: the model only
computes. What a batch consists of is in `mpnet/batch.py`, how its tokens are chosen in `mpnet/masking.py`; this
module puts the two together.

**Shapes.** L is the longest row of the batch. P is the number of slots of a *full* row, whatever
rows the batch holds: with rows of 512 tokens, 76, always. Full rows then always give the same
shapes, for which a compiled model or a CUDA graph is made once. A shorter row leaves slots empty,
which the loss passes over. At the end of an epoch nothing is special, because no batch is smaller
there (`training/loader.py`).

Here is a batch of one row, seven words of which one is predicted, in full:

>>> vocabulary = Vocabulary(
...     size=20, pad_id=1, mask_id=19, cls_id=0, sep_id=2, unk_id=3,
...     is_special_V=np.isin(np.arange(20), [0, 1, 2, 3, 19]),
...     starts_word_V=np.ones(20, dtype=np.bool_), random_ids=np.arange(4, 19))
>>> collator = DataCollatorForMaskedPermutedLanguageModeling(
...     vocabulary, ObjectiveConfig(rand_prob=0.0, keep_prob=0.0), max_tokens=9, seed=1)
>>> batch = collator([NumberedSequence(np.array([0, 11, 12, 13, 14, 15, 16, 17, 2]), epoch=0, index=0)])
>>> batch.input_ids
tensor([[ 0, 11, 19, 13, 14, 15, 16, 17,  2]])
>>> batch.predicted_positions, batch.predicted_ids
(tensor([[2]]), tensor([[12]]))

**Neighbours** change nothing about a row: neither how much of it is predicted, nor which tokens,
nor what stands in for them. Two words beside 510 of them are masked as they would be alone:

>>> usual = replace(collator, objective=ObjectiveConfig(), max_tokens=512)
>>> short = NumberedSequence(np.array([0, 12, 13, 2]), epoch=0, index=1)
>>> long = NumberedSequence(np.concatenate([[0], np.full(510, 11), [2]]), epoch=0, index=0)
>>> both, alone = usual([long, short]), usual([short])
>>> (both.predicted_ids != NOT_PREDICTED).sum(dim=1), both.num_predicted
(tensor([76,  1]), 77)
>>> bool((both.predicted_positions[1] == alone.predicted_positions[0]).all())
True

annotated-mpnet takes P from the shortest row: of this batch it would predict one token in each.

**Documents.** With `--packing documents` a row holds several documents (`text/cutting.py`), and
nothing of one may depend on another. Text never yields the token `<s>` (`text/tokenization.py`), so that
each one begins a document, and a cumulative sum numbers them. Each is masked as if it were a row of
its own, with its own 15 %, and the attention mask numbers them, where it otherwise says 1. Three
documents, and padding behind the last one:

>>> collator = replace(collator, packing="documents")
>>> rows = [NumberedSequence(np.array([0, 11, 12, 13, 2, 0, 14, 15, 2]), epoch=0, index=0),
...         NumberedSequence(np.array([0, 16, 2]), epoch=0, index=1)]
>>> batch = collator(rows)
>>> batch.attention_mask
tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2],
        [1, 1, 1, 0, 0, 0, 0, 0, 0]])
>>> batch.predicted_ids[:, :3]  # one token of each
tensor([[  12,   15, -100],
        [  16, -100, -100]])

Many short documents predict more tokens than one long one, because each predicts at least one. The
number of slots is therefore a multiple of 8 here: the usual one, or the next that is enough for the
batch. It varies from batch to batch, but not by every single token, so that a compiled model meets
few different shapes.

HF: `DataCollatorForLanguageModeling` has no order and labels of the shape of the sentence, of which
85 % say "not me"; its head computes a vocabulary for each of them.

Next: `training/loader.py`, which says which rows make batch number k.

    B batch   L tokens of a sentence   P predicted tokens   U four random numbers of a token
    N documents of a row and the padding   V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from annotated_mpnet.mpnet import masking
from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import ObjectiveConfig, Packing

Ids: TypeAlias = npt.NDArray[np.integer]
"""Token ids, of any integer type."""


@dataclass(frozen=True)
class Vocabulary:
    """What masking and packing know of a tokenizer: plain numbers and tables.

    A table of V bits is 30 kB for MPNet's vocabulary, and `table[ids]` answers for a whole batch in
    one call, where a tokenizer would be asked token by token.

    Attributes:
        size: V, the number of embedding rows: the largest id plus one.
        pad_id: fills short rows.
        mask_id: stands in for a predicted token.
        cls_id: begins a row.
        sep_id: ends a row, and each document within it.
        unk_id: stands for text that the vocabulary cannot spell.
        is_special_V: (V,) bool. Never predicted, never a random stand-in.
        starts_word_V: (V,) bool. Begins a word.
        random_ids: the ids that a random stand-in is drawn from: those that exist and are not
            special.
    """

    size: int
    pad_id: int
    mask_id: int
    cls_id: int
    sep_id: int
    unk_id: int
    is_special_V: npt.NDArray[np.bool_]
    starts_word_V: npt.NDArray[np.bool_]
    random_ids: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NumberedSequence:
    """A row of tokens and its place in the run, on which its masking depends.

    Attributes:
        input_ids: (L,) `<s>`, text, `</s>`.
        epoch: which time the row is seen, from 0.
        index: which row of the text it is.
    """

    input_ids: Ids
    epoch: int
    index: int


@dataclass(frozen=True)
class DataCollatorForMaskedPermutedLanguageModeling:
    """Makes batches of rows.

    Attributes:
        vocabulary: of the tokenizer that made the rows.
        objective: what is predicted, and how it is corrupted.
        max_tokens: the longest row, which sets the number of slots P.
        seed: the run's.
        stream: names the random numbers; see `for_evaluation`.
        packing: how the rows were packed; with "documents", one begins at each `<s>` of a row.
    """

    vocabulary: Vocabulary
    objective: ObjectiveConfig
    max_tokens: int
    seed: int
    stream: str = "mask"
    packing: Packing = "full"

    def for_evaluation(self) -> "DataCollatorForMaskedPermutedLanguageModeling":
        """Return a collator like this one, whose masks have nothing to do with the training's."""
        return replace(self, stream="mask of evaluation")

    @property
    def slots(self) -> int:
        """P: how many tokens a full row of one document predicts.

        An upper end for all rows: a row that holds further special tokens, or is shorter, has less
        to predict from.
        """
        predictable = np.array(self.max_tokens - 2)
        return int(masking.count_predicted(predictable, self.objective.pred_prob))

    def __call__(self, rows: Sequence[NumberedSequence]) -> Batch:
        """Make a batch of B rows of at most `max_tokens` tokens each.

        Returns:
            `input_ids` (B, L) with the stand-ins written into it (in the mode `plm`: without),
            `predicted_positions` and `predicted_ids` (B, P), and the two counts.
        """
        vocabulary = self.vocabulary
        original_BL, document_BL = self._pad(rows)
        draws_UBL = self._draw(rows, document_BL)
        positions_BP, valid_BP = self._choose(original_BL, document_BL, draws_UBL)
        # The targets are read off before the stand-ins are written.
        ids_BP = np.take_along_axis(original_BL, positions_BP, axis=1)

        # Paper: permuted language modelling alone (`plm`) corrupts nothing; there the queries hide
        # what is predicted, and the others are shown what it was.
        input_ids_BL = original_BL
        if self.objective.input_mode != "plm":
            input_ids_BL = original_BL.copy()
            stand_in_BP = masking.corrupt(
                ids_BP,
                np.take_along_axis(draws_UBL, positions_BP[None], axis=2),
                mask_id=vocabulary.mask_id,
                random_ids=vocabulary.random_ids,
                rand_prob=self.objective.rand_prob,
                keep_prob=self.objective.keep_prob,
            )
            # Only the slots in use are written back: an empty one points at position 0.
            row_BP = np.broadcast_to(np.arange(len(rows))[:, None], positions_BP.shape)
            input_ids_BL[row_BP[valid_BP], positions_BP[valid_BP]] = stand_in_BP[valid_BP]
        return Batch(
            input_ids=torch.from_numpy(input_ids_BL),
            predicted_positions=torch.from_numpy(positions_BP),
            predicted_ids=torch.from_numpy(np.where(valid_BP, ids_BP, NOT_PREDICTED)),
            # None where it would say 1 throughout: then attention needs no mask, which is the
            # faster kernel. Rows of several documents need it in any case, for their numbers.
            attention_mask=(
                None
                if self.packing != "documents" and document_BL.all()
                else torch.from_numpy(document_BL)
            ),
            num_tokens=int(np.count_nonzero(document_BL)),
            num_predicted=int(valid_BP.sum()),
        )

    def _pad(self, rows: Sequence[NumberedSequence]) -> tuple[masking.Ints, masking.Ints]:
        """Return tokens (B, L), and the number of the document that each belongs to (B, L).

        The numbers do for all that a mask would be needed for: 0 is padding, and where all of a row
        is one document, they say 1, as an attention mask does.
        """
        shape = len(rows), max(len(row.input_ids) for row in rows)
        original_BL = np.full(shape, self.vocabulary.pad_id, dtype=np.int64)
        document_BL = np.zeros(shape, dtype=np.int64)
        for i, row in enumerate(rows):
            original_BL[i, : len(row.input_ids)] = row.input_ids
            document_BL[i, : len(row.input_ids)] = 1
        if self.packing == "documents":
            document_BL *= np.cumsum(original_BL == self.vocabulary.cls_id, axis=1)
        return original_BL, document_BL

    def _draw(self, rows: Sequence[NumberedSequence], document_BL: masking.Ints) -> masking.Floats:
        """Return random numbers (U, B, L), 0 in the padding."""
        draws_UBL = np.zeros((4, *document_BL.shape))
        # Each document has its own generator, and that is the only reason for a loop. Padding draws
        # nothing: how long it is depends on the neighbours.
        for i, row in enumerate(rows):
            start = 0
            for number, length in enumerate(np.bincount(document_BL[i])[1:].tolist(), start=1):
                draws_UBL[:, i, start : start + length] = masking.draw(
                    self.seed, self.stream, row.epoch, row.index, length, number
                )
                start += length
        return draws_UBL

    def _choose(
        self, original_BL: masking.Ints, document_BL: masking.Ints, draws_UBL: masking.Floats
    ) -> tuple[masking.Ints, masking.Bools]:
        """Return the predicted positions (B, P), 0 in an empty slot, and which slots are used.

        An empty slot needs some position, because it is gathered from like the others; 0 is one
        that every row has. That it is empty, the model learns from `predicted_ids`.
        """
        predictable_BL = (document_BL > 0) & ~self.vocabulary.is_special_V[original_BL]
        starts_BL = (
            self.vocabulary.starts_word_V[original_BL]
            if self.objective.whole_word_mask
            else np.ones_like(predictable_BL)
        )
        word_BL = masking.find_words(starts_BL, predictable_BL)
        predictable_BN = masking.count_in_documents(predictable_BL, document_BL)
        count_BN = masking.count_predicted(predictable_BN, self.objective.pred_prob)
        chosen = masking.choose_predicted(word_BL, document_BL, count_BN, draws_UBL)
        # The slots that no row of this batch needs keep the shape that full rows have.
        needed = chosen.shape[1]
        slots = self.slots
        if self.packing == "documents":
            slots = -(-max(slots, needed) // 8) * 8
        positions_BP = np.pad(chosen, ((0, 0), (0, slots - needed)), constant_values=-1)
        return np.maximum(positions_BP, 0), positions_BP >= 0
