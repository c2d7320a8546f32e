"""The masked words of the validation text: always the same, and hidden from the model."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import InputMode, Packing
from annotated_mpnet.runs.masked_words import choose_words, guess_words
from annotated_mpnet.runs.texts import Text, read_text
from tiny_run import TinyText, changed, tiny_config, write_text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    return write_text(tmp_path_factory.mktemp("text"))


def text_of(tiny: TinyText, packing: Packing = "full") -> Text:
    config = changed(tiny_config(tiny, tiny.train_dir.parent / "run"), packing=packing)
    return read_text(config.data, config.run.seed)


@pytest.mark.parametrize("packing", ["full", "none", "documents"])
def test_three_whole_words_of_one_document_each_are_chosen(
    tiny: TinyText, packing: Packing
) -> None:
    text = text_of(tiny, packing)
    words = choose_words(text)
    assert len(words) == 3
    for each in words:
        first, *inner, last = each.ids_L.tolist()
        assert (first, last) == (text.vocabulary.cls_id, text.vocabulary.sep_id)
        assert not text.vocabulary.is_special_V[inner].any()
        assert text.tokenizer.decode([each.ids_L[each.place]]).isalpha()
    again = [(each.ids_L.tolist(), each.place) for each in choose_words(text_of(tiny, packing))]
    assert again == [(each.ids_L.tolist(), each.place) for each in words]


@pytest.mark.parametrize("mode", ["mpnet", "mlm", "plm"])
def test_the_word_is_hidden_and_the_guesses_are_the_likeliest(
    tiny: TinyText, mode: InputMode
) -> None:
    text = text_of(tiny)
    words = choose_words(text)
    batches: list[Batch] = []

    def logits(batch: Batch) -> torch.Tensor:
        batches.append(batch)
        logits_BPV = torch.zeros(1, 1, text.vocabulary.size)
        logits_BPV[0, 0, batch.predicted_ids[0, 0]] = 9.0
        return logits_BPV

    trainer: Any = SimpleNamespace(input_mode=mode, logits=logits)
    guesses = guess_words(trainer, words, text)
    for batch, word, guess in zip(batches, words, guesses, strict=True):
        hidden = word.ids_L.copy()
        if mode != "plm":  # there the prediction order hides it
            hidden[word.place] = text.vocabulary.mask_id
        assert batch.input_ids[0].tolist() == hidden.tolist()
        assert batch.predicted_positions.tolist() == [[word.place]]
        assert guess.best[0] == (guess.word, guess.probability)
        assert guess.probability > 0.9
        assert len(guess.before) <= 32
        assert len(guess.after) <= 20


def test_a_text_without_whole_words_or_without_validation_has_no_guesses(tiny: TinyText) -> None:
    text = text_of(tiny)
    assert choose_words(dataclasses.replace(text, valid=None)) == []
    pieces = dataclasses.replace(
        text.vocabulary, starts_word_V=np.zeros_like(text.vocabulary.starts_word_V)
    )
    assert choose_words(dataclasses.replace(text, vocabulary=pieces)) == []
