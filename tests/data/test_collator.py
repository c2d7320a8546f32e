"""Sequences to a batch: masks, padding, and documents that share a sequence."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.collator import (
    DataCollatorForMaskedPermutedLanguageModeling,
    NumberedSequence,
    Vocabulary,
)
from annotated_mpnet.mpnet.config import ObjectiveConfig

MAX_TOKENS = 64
IS_SPECIAL_V = np.isin(np.arange(97), [0, 1, 2, 3, 96])
VOCABULARY = Vocabulary(
    size=97,
    pad_id=1,
    mask_id=96,
    cls_id=0,
    sep_id=2,
    unk_id=3,
    is_special_V=IS_SPECIAL_V,
    starts_word_V=np.arange(97) % 4 != 0,
    ends_word_V=np.arange(97) % 7 == 0,
    random_ids=np.flatnonzero(~IS_SPECIAL_V),
)
LENGTHS = st.lists(st.integers(3, MAX_TOKENS), min_size=1, max_size=8)


def collator(**objective: object) -> DataCollatorForMaskedPermutedLanguageModeling:
    return DataCollatorForMaskedPermutedLanguageModeling(
        VOCABULARY, ObjectiveConfig(**objective), MAX_TOKENS, seed=3
    )


def sequences_of(lengths: list[int], epoch: int = 0, seed: int = 0) -> list[NumberedSequence]:
    generator = np.random.default_rng(seed)
    sequences = []
    for index, length in enumerate(lengths):
        ids = generator.integers(4, 96, size=length).astype(np.int32)
        ids[0], ids[-1] = 0, 2
        sequences.append(NumberedSequence(ids, epoch, index))
    return sequences


def predicted(batch: Batch, sequence: int) -> list[tuple[int, int, int]]:
    """Return (position, original token, input token) in prediction order."""
    used = batch.predicted_ids[sequence] != NOT_PREDICTED
    positions = batch.predicted_positions[sequence][used]
    return list(
        zip(
            positions.tolist(),
            batch.predicted_ids[sequence][used].tolist(),
            batch.input_ids[sequence][positions].tolist(),
            strict=True,
        )
    )


@given(LENGTHS)
def test_batch_holds_the_sequences_except_for_corrupted_tokens(lengths):
    sequences = sequences_of(lengths)
    batch = collator()(sequences)
    for i, sequence in enumerate(sequences):
        restored = batch.input_ids[i].clone()
        for position, original, _ in predicted(batch, i):
            assert sequence.input_ids[position] == original
            restored[position] = original
        assert restored[: len(sequence.input_ids)].tolist() == sequence.input_ids.tolist()
        assert (restored[len(sequence.input_ids) :] == VOCABULARY.pad_id).all()


@given(LENGTHS)
def test_counts_and_shapes_are_right(lengths):
    batch = collator()(sequences_of(lengths))
    assert batch.input_ids.shape == (len(lengths), max(lengths))
    # round(0.15 * 62) = 9 slots for any sequences.
    assert batch.predicted_ids.shape == batch.predicted_positions.shape == (len(lengths), 9)
    assert batch.num_tokens == sum(lengths)
    expected = [max(1, round(0.15 * (length - 2))) for length in lengths]
    assert batch.num_predicted == sum(expected)
    used = batch.predicted_ids != NOT_PREDICTED
    assert used.sum(dim=1).tolist() == expected
    assert (batch.predicted_positions[~used] == 0).all()
    for tensor in (batch.input_ids, batch.predicted_ids, batch.predicted_positions):
        assert tensor.dtype == torch.int64


@given(LENGTHS)
def test_there_is_an_attention_mask_only_with_padding(lengths):
    mask = collator()(sequences_of(lengths)).attention_mask
    if len(set(lengths)) == 1:
        assert mask is None
    else:
        assert mask is not None
        assert mask.sum(dim=1).tolist() == lengths


@given(LENGTHS, st.integers(0, 3))
def test_masking_does_not_depend_on_the_batch(lengths, epoch):
    sequences = sequences_of(lengths, epoch)
    together = collator()(sequences)
    for i, sequence in enumerate(sequences):
        alone = collator()([sequence])
        assert predicted(together, i) == predicted(alone, 0)


def test_masking_does_not_depend_on_the_number_of_slots():
    sequences = sequences_of([20, 40])
    wide = dataclasses.replace(collator(), max_tokens=500)
    assert wide(sequences).predicted_ids.shape == (2, 75)
    for i in range(2):
        assert predicted(wide(sequences), i) == predicted(collator()(sequences), i)


def test_documents_of_mixed_length_predict_15_percent_of_all_tokens():
    lengths = np.random.default_rng(0).integers(3, MAX_TOKENS + 1, size=600)
    sequences = sequences_of(lengths.tolist())
    batches = [collator()(sequences[first : first + 8]) for first in range(0, 600, 8)]
    share = sum(batch.num_predicted for batch in batches) / sum(lengths - 2)
    assert 0.14 < share < 0.16


def test_sequence_without_a_predictable_token_predicts_nothing():
    sequences = [
        NumberedSequence(np.array([0, 3, 3, 2]), 0, 0),
        NumberedSequence(np.array([0, 50, 2]), 0, 1),
    ]
    batch = collator()(sequences)
    assert predicted(batch, 0) == []
    assert batch.num_predicted == len(predicted(batch, 1)) == 1
    assert collator()(sequences[:1]).num_predicted == 0


def test_special_tokens_are_neither_predicted_nor_random_replacements():
    batch = collator(rand_prob=1.0, keep_prob=0.0)(sequences_of([MAX_TOKENS] * 200))
    assert not IS_SPECIAL_V[batch.predicted_ids].any()
    corrupted = batch.input_ids.gather(1, batch.predicted_positions)
    assert not IS_SPECIAL_V[corrupted].any()


def test_plm_reads_the_original_and_predicts_the_same_tokens():
    sequences = sequences_of([64, 30, 50])
    masked, permuted = collator()(sequences), collator(input_mode="plm")(sequences)
    mlm = collator(input_mode="mlm")(sequences)
    assert (permuted.predicted_positions == masked.predicted_positions).all()
    assert (permuted.predicted_ids == masked.predicted_ids).all()
    assert (mlm.input_ids == masked.input_ids).all()
    assert not (masked.input_ids == permuted.input_ids).all()
    for i, sequence in enumerate(sequences):
        assert (
            permuted.input_ids[i, : len(sequence.input_ids)].tolist() == sequence.input_ids.tolist()
        )


def test_without_whole_word_masking_each_token_is_a_word():
    # Words of two tokens, at 1 and 2, 3 and 4, ...; six tokens are predicted.
    ids = np.array([0, *[9, 8] * 20, 2])
    whole, single = (
        {p for p, *_ in predicted(collator(whole_word_mask=each)([NumberedSequence(ids, 0, 0)]), 0)}
        for each in (True, False)
    )
    assert len(whole) == len(single) == 6
    assert len({(position + 1) // 2 for position in whole}) == 3
    assert len({(position + 1) // 2 for position in single}) > 3


def test_a_word_ends_after_a_token_that_ends_one():
    # 28, 32 and 36 continue a word and 28 ends it: words of three tokens.
    ids = np.array([0, *[32, 36, 28] * 13, 2])
    found = {p for p, *_ in predicted(collator()([NumberedSequence(ids, 0, 0)]), 0)}
    assert len(found) == 6
    assert len({(position - 1) // 3 for position in found}) == 2


@pytest.mark.parametrize("change", [{"epoch": 1}, {"index": 9}])
def test_masks_change_with_epoch_and_sequence(change):
    sequence = sequences_of([MAX_TOKENS])[0]
    first, second = collator()([sequence]), collator()([dataclasses.replace(sequence, **change)])
    assert predicted(first, 0) != predicted(second, 0)


def test_masks_of_evaluation_differ_from_those_of_training():
    sequences = sequences_of([MAX_TOKENS])
    training, evaluation = collator()(sequences), collator().for_evaluation()(sequences)
    assert predicted(training, 0) != predicted(evaluation, 0)


# --packing documents.

DOCUMENT_LENGTHS = st.lists(
    st.lists(st.integers(3, 14), min_size=1, max_size=4), min_size=1, max_size=5
)


def shared_sequences(lengths: list[list[int]]) -> list[NumberedSequence]:
    """Return sequences with documents of these lengths."""
    flat = iter(sequences_of([length for sequence in lengths for length in sequence]))
    return [
        NumberedSequence(np.concatenate([next(flat).input_ids for _ in sequence]), 0, index)
        for index, sequence in enumerate(lengths)
    ]


def in_documents() -> DataCollatorForMaskedPermutedLanguageModeling:
    return dataclasses.replace(collator(), packing="documents")


@given(DOCUMENT_LENGTHS)
def test_attention_mask_numbers_the_documents(lengths):
    batch = in_documents()(shared_sequences(lengths))
    assert batch.attention_mask is not None
    width = max(map(sum, lengths))
    for sequence, mask in zip(lengths, batch.attention_mask.tolist(), strict=True):
        expected = [
            number for number, length in enumerate(sequence, start=1) for _ in range(length)
        ]
        assert mask == expected + [0] * (width - len(expected))
    assert batch.num_tokens == sum(map(sum, lengths))


@given(DOCUMENT_LENGTHS)
def test_each_document_predicts_its_own_share(lengths):
    batch = in_documents()(shared_sequences(lengths))
    for i, sequence in enumerate(lengths):
        starts = np.cumsum([0, *sequence])
        positions = np.array([position for position, *_ in predicted(batch, i)])
        counts = np.histogram(positions, bins=starts)[0]
        # At least one token: 15 % of up to 12 tokens is one or two.
        assert counts.tolist() == [max(1, round(0.15 * (length - 2))) for length in sequence]
        assert (np.diff(np.searchsorted(starts, positions, side="right")) >= 0).all()


def test_masking_of_a_document_does_not_depend_on_its_neighbours():
    # The same second document, after a shorter and a longer first one.
    texts = [sequence.input_ids for sequence in sequences_of([9, 30, 22, 12])]
    short = NumberedSequence(np.concatenate([texts[0], texts[2]]), 0, 5)
    long = NumberedSequence(np.concatenate([texts[1], texts[2], texts[3]]), 0, 5)
    after = {
        len(first): [
            (position - len(first), *rest)
            for position, *rest in predicted(in_documents()([sequence]), 0)
            if len(first) <= position < len(first) + 22
        ]
        for first, sequence in ((texts[0], short), (texts[1], long))
    }
    assert after[9] == after[30]
    assert len(after[9]) == 3


def test_a_single_document_has_the_same_masks_with_any_packing():
    sequences = sequences_of([64, 20, 33])
    plain, numbered = collator()(sequences), in_documents()(sequences)
    assert (plain.input_ids == numbered.input_ids).all()
    assert plain.attention_mask is not None
    assert (plain.attention_mask == numbered.attention_mask).all()
    for i in range(3):
        assert predicted(plain, i) == predicted(numbered, i)


def test_documents_have_the_usual_slots_or_the_next_multiple_of_eight():
    few, many = shared_sequences([[30, 34]]), shared_sequences([[4] * 16, [60]])
    assert in_documents()(few).predicted_ids.shape == (1, 16)  # 9 usual ones
    assert in_documents()(many).predicted_ids.shape == (2, 16)
    assert in_documents()(shared_sequences([[3] * 21])).predicted_ids.shape == (1, 24)


# Faults 17 and 18.


def test_short_document_in_a_batch_takes_nothing_from_the_long_ones():
    long = sequences_of([64, 64, 64])
    tiny = NumberedSequence(np.array([0, 50, 2]), 0, 99)
    alone, together = collator()(long), collator()([*long, tiny])
    for i in range(3):
        assert predicted(together, i) == predicted(alone, i)
    assert together.num_predicted == alone.num_predicted + 1


@given(st.lists(st.sampled_from([0, 1, 2, 3, 96]), max_size=6), st.booleans())
def test_special_tokens_alone_are_never_targets(specials, with_neighbour):
    sequences = [NumberedSequence(np.array([0, *specials, 2]), 0, 0)]
    sequences += sequences_of([40]) if with_neighbour else []
    for each in (collator(), in_documents()):
        batch = each(sequences)
        assert predicted(batch, 0) == []
        assert batch.num_predicted == (6 if with_neighbour else 0)
