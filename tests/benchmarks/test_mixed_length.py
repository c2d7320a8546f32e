"""The padded rows of the comparison are those that it says they are, and so is the packed text."""

import doctest
from itertools import islice
from pathlib import Path

import pytest
import torch
from scripts import checked, run_main

import mixed_length
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ObjectiveConfig
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of
from mixed_length import WAYS, Documents, as_the_shortest, batches_of
from tiny_run import TinyText, write_text

LENGTH = 48


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def documents(text: TinyText) -> Documents:
    return Documents.read(text.train_dir, load_tokenizer(str(text.tokenizer)))


@pytest.fixture(scope="module")
def collator(text: TinyText) -> DataCollatorForMaskedPermutedLanguageModeling:
    vocabulary = vocabulary_of(load_tokenizer(str(text.tokenizer)))
    return DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary, ObjectiveConfig(), LENGTH, seed=1
    )


def test_examples_hold() -> None:
    assert doctest.testmod(mixed_length).failed == 0


@pytest.mark.parametrize(("lengths", "slots"), [((3, 40, 20), 1), ((26, 40, 30), 4), ((99, 99), 7)])
def test_all_rows_predict_as_much_as_the_shortest(
    lengths: tuple[int, ...],
    slots: int,
    collator: DataCollatorForMaskedPermutedLanguageModeling,
) -> None:
    # 15 % of 3, 26, and of the 46 that a row of 48 has room for. A batch sees all documents.
    documents = Documents([[10] * length for length in lengths], [99] * len(lengths))
    for way in ("padded", "64+, ours"):
        batch = next(batches_of(WAYS[way], documents, collator, len(lengths)))
        assert batch.predicted_ids.shape == (len(lengths), slots)
        assert (batch.predicted_ids == 10).all()
        assert batch.num_predicted == len(lengths) * slots
        assert batch.num_tokens == sum(min(length + 2, LENGTH) for length in lengths)


def test_a_shorter_slot_count_keeps_what_was_to_be_predicted_first(
    documents: Documents, collator: DataCollatorForMaskedPermutedLanguageModeling
) -> None:
    batch = next(batches_of(WAYS["own P"], documents, collator, 8))
    cut = as_the_shortest(batch)
    P = cut.predicted_ids.shape[1]
    assert torch.equal(cut.predicted_positions, batch.predicted_positions[:, :P])
    assert torch.equal(cut.input_ids, batch.input_ids)
    assert cut.num_predicted < batch.num_predicted
    assert cut.num_tokens == batch.num_tokens


def test_packed_rows_are_full(
    documents: Documents, collator: DataCollatorForMaskedPermutedLanguageModeling
) -> None:
    for batch in islice(batches_of(WAYS["packed"], documents, collator, 4), 5):
        assert batch.input_ids.shape == (4, LENGTH)
        assert batch.attention_mask is None


def test_short_documents_are_left_out_where_it_says_so(documents: Documents) -> None:
    assert 0 < len(documents.of_at_least(64)) < len(documents.of_at_least(1))
    assert len(documents.of_at_least(1)) == len(documents.tokens)


def test_both_forms_have_the_same_loss_on_padded_rows(
    documents: Documents, collator: DataCollatorForMaskedPermutedLanguageModeling
) -> None:
    from common import Shape
    from contestants import Setting, our_model
    from permuted_form import PermutedForm

    model = our_model(Setting(Shape(2, 16, 32, 2, 400, 4, LENGTH)))
    batch = next(batches_of(WAYS["padded"], documents, collator, 4))
    losses = model.loss_sum(batch), PermutedForm(model).loss_sum(batch)
    torch.testing.assert_close(*losses)


def test_the_script_compares_all_ways(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        "--shape",
        "demo",
        "--layers",
        "1",
        "--width",
        "32",
        "--batch",
        "4",
        "--rounds",
        "2",
        "--lengths",
        "48",
    ]
    flags += ["--text", str(text.train_dir), "--tokenizer", str(text.tokenizer)]
    results = run_main(mixed_length.main, flags, tmp_path, monkeypatch)
    ways = results["48"]
    assert set(ways) == set(WAYS)
    assert ways["packed"]["packed_is_faster_by"] == 1
    assert ways["padded"]["slots"] == ways["padded, ours"]["slots"]
    assert all(len(way["seconds"]) == 2 for way in ways.values())
    checked(capsys.readouterr().out)
