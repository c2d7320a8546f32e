"""An update is the same for any division into ranks and micro-batches."""

from itertools import islice

import pytest
from fake_shards import (
    TOKENIZER,
    VOCABULARY,
    hash_of,
    in_memory,
    loader_from,
    stream_from,
    text_of,
)

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ObjectiveConfig
from annotated_mpnet.text.packing import pack_sequences
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.training.loader import BatchLoader


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> PackedSequences:
    directory = tmp_path_factory.mktemp("updates")
    (directory / "text.txt").write_text("\n".join(text_of(i) for i in range(40)) + "\n")
    return pack_sequences([directory / "text.txt"], TOKENIZER, 12, cache_dir=directory)


def loader(sequences: PackedSequences, batch_size: int, **options: int) -> BatchLoader:
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        VOCABULARY, ObjectiveConfig(), max_tokens=12, seed=3
    )
    return BatchLoader(sequences, collator, batch_size, 3, **options)


def batches_of(
    sequences: PackedSequences,
    update: int,
    *,
    batch_size: int,
    micro_batches: int,
    world_size: int = 1,
) -> list[Batch]:
    """Return all batches of an update, of all ranks."""
    found = []
    for rank in range(world_size):
        source = loader(sequences, batch_size, rank=rank, world_size=world_size)
        batches, state = next(source.updates(update, micro_batches))
        assert state is None
        assert len(batches) == micro_batches
        found += batches
    return found


def sequences_of(batches: list[Batch]) -> list[tuple[tuple[int, ...], ...]]:
    """Return each sequence with its masks, sorted, so that batches do not matter."""
    return sorted(
        (tuple(ids.tolist()), tuple(positions.tolist()), tuple(predicted.tolist()))
        for batch in batches
        for ids, positions, predicted in zip(
            batch.input_ids, batch.predicted_positions, batch.predicted_ids, strict=True
        )
    )


@pytest.mark.parametrize("update", [0, 1, 7])
def test_update_has_the_same_sequences_and_masks_for_any_ranks_and_micro_batches(sequences, update):
    expected = sequences_of(batches_of(sequences, update, batch_size=8, micro_batches=2))
    assert len(expected) == 16
    for layout in ((4, 4, 1), (16, 1, 1), (8, 1, 2), (4, 2, 2), (4, 1, 4), (2, 2, 4)):
        batch_size, micro_batches, world_size = layout
        batches = batches_of(
            sequences,
            update,
            batch_size=batch_size,
            micro_batches=micro_batches,
            world_size=world_size,
        )
        assert sequences_of(batches) == expected


def test_updates_begin_anywhere_and_follow_one_another(sequences):
    source = loader(sequences, 4)
    whole = [hash_of(batches) for batches, _ in islice(source.updates(0, 2), 12)]
    assert len(set(whole)) == 12
    assert [hash_of(batches) for batches, _ in islice(source.updates(5, 2), 7)] == whole[5:]
    assert whole[0] == hash_of([source.batch(0), source.batch(1)])


def test_stream_loader_yields_updates_like_a_batch_loader():
    batches, state = next(loader_from(stream_from(in_memory([30])), batch_size=4).updates(0, 2))
    assert [len(batch.input_ids) for batch in batches] == [4, 4]
    assert state.delivered == 8
