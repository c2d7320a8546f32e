"""The padded and packed sequences of the comparison are what its page says."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from scripts import checked, run_main

import mixed_length
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.mpnet.config import ObjectiveConfig
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of
from mixed_length import STRATEGIES, Documents, batches_of, with_equal_predictions
from tiny_run import TinyText

LENGTH = 48


@pytest.fixture(scope="module")
def documents(text: TinyText) -> Documents:
    return Documents.read(text.train_dir, load_tokenizer(str(text.tokenizer)))


@pytest.fixture(scope="module")
def collator(text: TinyText) -> DataCollatorForMaskedPermutedLanguageModeling:
    vocabulary = vocabulary_of(load_tokenizer(str(text.tokenizer)))
    return DataCollatorForMaskedPermutedLanguageModeling(
        vocabulary, ObjectiveConfig(), LENGTH, seed=1
    )


@pytest.mark.parametrize(("lengths", "slots"), [((3, 40, 20), 1), ((26, 40, 30), 4), ((99, 99), 7)])
def test_all_sequences_predict_as_many_tokens_as_the_shortest(
    lengths: tuple[int, ...],
    slots: int,
    collator: DataCollatorForMaskedPermutedLanguageModeling,
) -> None:
    # 15 % of 3, of 26, and of the 46 tokens that fit into 48. Each batch has all documents.
    documents = Documents([[10] * length for length in lengths], [99] * len(lengths))
    for name in ("padded", "64+, ours"):
        batch = next(batches_of(STRATEGIES[name], documents, collator, len(lengths)))
        assert batch.predicted_ids.shape == (len(lengths), slots)
        assert (batch.predicted_ids == 10).all()
        assert batch.num_predicted == len(lengths) * slots
        assert batch.num_tokens == sum(min(length + 2, LENGTH) for length in lengths)


def test_equal_predictions_are_the_first_of_each_sequence(
    documents: Documents, collator: DataCollatorForMaskedPermutedLanguageModeling
) -> None:
    batch = next(batches_of(STRATEGIES["own P"], documents, collator, 8))
    cut = with_equal_predictions(batch)
    P = cut.predicted_ids.shape[1]
    assert torch.equal(cut.predicted_positions, batch.predicted_positions[:, :P])
    assert torch.equal(cut.input_ids, batch.input_ids)
    assert cut.num_predicted < batch.num_predicted
    assert cut.num_tokens == batch.num_tokens


def test_packed_sequences_are_full(
    documents: Documents, collator: DataCollatorForMaskedPermutedLanguageModeling
) -> None:
    for batch in islice(batches_of(STRATEGIES["packed"], documents, collator, 4), 5):
        assert batch.input_ids.shape == (4, LENGTH)
        assert batch.attention_mask is None


def test_documents_below_the_limit_are_left_out(documents: Documents) -> None:
    assert 0 < len(documents.of_at_least(64)) < len(documents.of_at_least(1))
    assert len(documents.of_at_least(1)) == len(documents.tokens)


def test_both_forms_have_the_same_loss_on_padded_sequences(
    documents: Documents, collator: DataCollatorForMaskedPermutedLanguageModeling
) -> None:
    from common import Shape
    from contestants import Setting, our_model
    from permuted_form import PermutedForm

    model = our_model(Setting(Shape(2, 16, 32, 2, 400, 4, LENGTH)))
    batch = next(batches_of(STRATEGIES["padded"], documents, collator, 4))
    losses = model.loss_sum(batch), PermutedForm(model).loss_sum(batch)
    torch.testing.assert_close(*losses)


def test_the_script_compares_all_strategies(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--shape", "demo", "--layers", "1", "--width", "32", "--batch", "4"]
    flags += ["--rounds", "2", "--lengths", "48"]
    flags += ["--text", str(text.train_dir), "--tokenizer", str(text.tokenizer)]
    results = run_main(mixed_length.main, flags, tmp_path, monkeypatch)
    found = results["48"]
    assert set(found) == set(STRATEGIES)
    assert found["packed"]["packed_is_faster_by"] == 1
    assert found["padded"]["slots"] == found["padded, ours"]["slots"]
    assert all(len(each["seconds"]) == 2 for each in found.values())
    checked(capsys.readouterr().out)
