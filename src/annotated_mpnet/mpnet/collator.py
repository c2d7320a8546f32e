"""From sequences to a batch: padded, masked, and in the model's terms.

`mpnet/batch.py` says what is in a batch, `mpnet/masking.py` chooses the tokens; this module joins
the two. After it nothing about the objective is random: the model only computes. Here is a batch of
one sequence, seven words of which one is predicted:

>>> vocabulary = Vocabulary(
...     size=20, pad_id=1, mask_id=19, cls_id=0, sep_id=2, unk_id=3,
...     is_special_V=np.isin(np.arange(20), [0, 1, 2, 3, 19]),
...     starts_word_V=np.ones(20, dtype=np.bool_), ends_word_V=np.ones(20, dtype=np.bool_),
...     random_ids=np.arange(4, 19))
>>> collator = DataCollatorForMaskedPermutedLanguageModeling(
...     vocabulary, ObjectiveConfig(rand_prob=0.0, keep_prob=0.0), max_tokens=9, seed=1)
>>> ids = np.array([0, 11, 12, 13, 14, 15, 16, 17, 2])
>>> batch = collator([NumberedSequence(ids, epoch=0, index=0)])
>>> batch.input_ids
tensor([[ 0, 11, 19, 13, 14, 15, 16, 17,  2]])
>>> batch.predicted_positions, batch.predicted_ids
(tensor([[2]]), tensor([[12]]))

**Shapes.** L is the longest sequence of the batch. P is what a *full* sequence predicts, whatever
the batch holds: always 76 for 512 tokens. Full sequences then always give the same shapes, for
which a model is compiled once. A shorter sequence leaves slots empty.

**Independence.** A sequence is masked alike in any batch. Two words next to 510 predict one token,
and the same one as alone:

>>> usual = replace(collator, objective=ObjectiveConfig(), max_tokens=512)
>>> short = NumberedSequence(np.array([0, 12, 13, 2]), epoch=0, index=1)
>>> long = NumberedSequence(np.concatenate([[0], np.full(510, 11), [2]]), epoch=0, index=0)
>>> both, alone = usual([long, short]), usual([short])
>>> (both.predicted_ids != NOT_PREDICTED).sum(dim=1)
tensor([76,  1])
>>> bool((both.predicted_positions[1] == alone.predicted_positions[0]).all())
True

**Documents.** With `--packing documents` a sequence holds several documents, and none may depend on
another. Each is masked by itself, and the attention mask numbers them where it otherwise says 1.
Each begins with `<s>`, which text never contains, so a cumulative sum counts them. Three documents,
and padding after the last one:

>>> collator = replace(collator, packing="documents")
>>> batch = collator([
...     NumberedSequence(np.array([0, 11, 12, 13, 2, 0, 14, 15, 2]), epoch=0, index=0),
...     NumberedSequence(np.array([0, 16, 2]), epoch=0, index=1)])
>>> batch.attention_mask
tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2],
        [1, 1, 1, 0, 0, 0, 0, 0, 0]])
>>> batch.predicted_ids[:, :3]  # one token of each
tensor([[  12,   15, -100],
        [  16, -100, -100]])

Next: `mpnet/randomness.py`, where the random numbers come from.

    N documents of a sequence, and the padding   U the five random numbers of a token
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
    """What masking and packing need to know of a tokenizer, as numbers and tables.

    Attributes:
        size: V, the rows of the embedding table: the largest id plus one.
        pad_id: fills short sequences.
        mask_id: replaces a predicted token.
        cls_id: begins a sequence, and each document in it.
        sep_id: ends a sequence, and each document in it.
        unk_id: replaces text that the vocabulary cannot spell.
        is_special_V: (V,) bool. Never predicted, never a random replacement.
        starts_word_V: (V,) bool. Begins a word.
        ends_word_V: (V,) bool. Ends a word, so whatever comes next begins one.
        random_ids: the ids that random replacements are drawn from: all that exist and are not
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
    ends_word_V: npt.NDArray[np.bool_]
    random_ids: npt.NDArray[np.int64]

    def begins_word(self, ids_BL: Ids) -> npt.NDArray[np.bool_]:
        """Return which tokens begin a word, (B, L): by itself, or after one that ends a word."""
        begins_BL = self.starts_word_V[ids_BL]
        begins_BL[:, 1:] |= self.ends_word_V[ids_BL[:, :-1]]
        return begins_BL


@dataclass(frozen=True, slots=True)
class NumberedSequence:
    """A sequence and its position in the run, on which its masks depend.

    Attributes:
        input_ids: (L,) `<s>`, text, `</s>`.
        epoch: how often it was seen before.
        index: its number in the text.
    """

    input_ids: Ids
    epoch: int
    index: int


@dataclass(frozen=True)
class DataCollatorForMaskedPermutedLanguageModeling:
    """Makes batches.

    Attributes:
        vocabulary: of the tokenizer that made the sequences.
        objective: what is predicted, and how it is corrupted.
        max_tokens: length of a full sequence, which sets the number of slots P.
        seed: of the run.
        stream: names the random numbers; see `for_evaluation`.
        packing: how the sequences were packed.
    """

    vocabulary: Vocabulary
    objective: ObjectiveConfig
    max_tokens: int
    seed: int
    stream: str = "mask"
    packing: Packing = "full"

    def for_evaluation(self) -> "DataCollatorForMaskedPermutedLanguageModeling":
        """Return a collator like this one, with masks that are independent of the training's."""
        return replace(self, stream="mask of evaluation")

    def __call__(self, sequences: Sequence[NumberedSequence]) -> Batch:
        """Make a batch of B sequences of at most `max_tokens` tokens each."""
        input_ids_BL, document_BL = self._pad(sequences)
        draws_UBL = self._draw(sequences, document_BL)
        chosen_BP = self._choose(input_ids_BL, document_BL, draws_UBL)
        used_BP = chosen_BP >= 0
        # An empty slot is gathered from like the others, so it needs some position.
        positions_BP = np.maximum(chosen_BP, 0)
        original_BP = np.take_along_axis(input_ids_BL, positions_BP, axis=1)
        # Paper: permuted language modelling alone (`plm`) corrupts nothing.
        if self.objective.input_mode != "plm":
            corrupted_BP = masking.corrupt(
                original_BP,
                np.take_along_axis(draws_UBL, positions_BP[None], axis=2),
                mask_id=self.vocabulary.mask_id,
                random_ids=self.vocabulary.random_ids,
                rand_prob=self.objective.rand_prob,
                keep_prob=self.objective.keep_prob,
            )
            of_sequence = np.nonzero(used_BP)[0]
            input_ids_BL[of_sequence, positions_BP[used_BP]] = corrupted_BP[used_BP]
        # Without padding there is no mask, and attention has a faster kernel.
        full = self.packing != "documents" and bool(document_BL.all())
        return Batch(
            input_ids=torch.from_numpy(input_ids_BL),
            predicted_positions=torch.from_numpy(positions_BP),
            predicted_ids=torch.from_numpy(np.where(used_BP, original_BP, NOT_PREDICTED)),
            attention_mask=None if full else torch.from_numpy(document_BL),
            num_tokens=int(np.count_nonzero(document_BL)),
            num_predicted=int(used_BP.sum()),
        )

    def _pad(self, sequences: Sequence[NumberedSequence]) -> tuple[masking.Ints, masking.Ints]:
        """Return the tokens (B, L), and the number of each token's document (B, L).

        A sequence of one document has the numbers of an ordinary attention mask: 1, and 0 for
        padding.
        """
        shape = len(sequences), max(len(each.input_ids) for each in sequences)
        input_ids_BL = np.full(shape, self.vocabulary.pad_id, dtype=np.int64)
        document_BL = np.zeros(shape, dtype=np.int64)
        for i, each in enumerate(sequences):
            input_ids_BL[i, : len(each.input_ids)] = each.input_ids
            document_BL[i, : len(each.input_ids)] = 1
        if self.packing == "documents":
            document_BL *= np.cumsum(input_ids_BL == self.vocabulary.cls_id, axis=1)
        return input_ids_BL, document_BL

    def _draw(
        self, sequences: Sequence[NumberedSequence], document_BL: masking.Ints
    ) -> masking.Floats:
        """Return the random numbers of each token, (U, B, L); padding draws none."""
        draws_UBL = np.zeros((5, *document_BL.shape))
        for i, each in enumerate(sequences):
            start = 0
            for number, length in enumerate(np.bincount(document_BL[i])[1:].tolist(), start=1):
                draws_UBL[:, i, start : start + length] = masking.draw(
                    self.seed, self.stream, each.epoch, each.index, length, number
                )
                start += length
        return draws_UBL

    def _choose(
        self, input_ids_BL: masking.Ints, document_BL: masking.Ints, draws_UBL: masking.Floats
    ) -> masking.Ints:
        """Return the predicted positions (B, P), -1 in an empty slot."""
        predictable_BL = (document_BL > 0) & ~self.vocabulary.is_special_V[input_ids_BL]
        starts_BL = np.ones_like(predictable_BL)
        if self.objective.whole_word_mask:
            starts_BL = self.vocabulary.begins_word(input_ids_BL)
        word_BL = masking.find_words(starts_BL, predictable_BL)
        predictable_BN = masking.count_in_documents(predictable_BL, document_BL)
        count_BN = masking.count_predicted(predictable_BN, self.objective.pred_prob)
        chosen = masking.choose_predicted(word_BL, document_BL, count_BN, draws_UBL)
        needed, full = chosen.shape[1], np.array(self.max_tokens - 2)
        slots = int(masking.count_predicted(full, self.objective.pred_prob))
        # Many short documents predict more than one long document, since each predicts at least
        # one token. Steps of 8 keep the number of shapes small.
        if self.packing == "documents":
            slots = -(-max(slots, needed) // 8) * 8
        return np.pad(chosen, ((0, 0), (0, slots - needed)), constant_values=-1)
