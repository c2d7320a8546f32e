"""The model card, as the Hub and a reader see it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_models import converted, save_tiny_checkpoint, tiny_config, tiny_model

from annotated_mpnet.conversion.kept import base_facts
from annotated_mpnet.conversion.model_card import FRESH, CardFacts, model_card
from annotated_mpnet.runs.card import card_facts
from annotated_mpnet.settings.config import DataConfig, PretrainingConfig, RunConfig


def card_of(facts: CardFacts | None, fresh_head: bool = False, encoder: bool = False) -> str:
    return model_card(
        facts,
        tiny_config(),
        Path("somewhere/hf"),
        None,
        parameters=12_345,
        is_sentence_encoder=encoder,
        fresh_head=fresh_head,
    )


def test_hub_reads_base_and_dataset_from_the_card() -> None:
    config = PretrainingConfig(
        data=DataConfig(dataset_name="some/text", dataset_config="small"),
        run=RunConfig(hf_model_path="microsoft/mpnet-base"),
    )
    facts = card_facts(config, config.run.initial_weights)
    card = ModelCard(card_of(facts), ignore_metadata_errors=False)
    assert card.data.base_model == "microsoft/mpnet-base"
    assert card.data.datasets == ["some/text"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "fill-mask"
    assert "# somewhere\n" in card.text
    assert facts.data == {
        "training": "some/text (configuration small, split train)",
        "validation": "documents held out of it",
        "test": "documents held out of it",
    }


def test_local_paths_are_not_given_as_names_on_the_hub(tmp_path: Path) -> None:
    data = DataConfig(train_dir=tmp_path / "poems", valid_fraction=0.02)
    facts = card_facts(PretrainingConfig(data=data), None)
    card = ModelCard(card_of(facts), ignore_metadata_errors=False)
    assert (facts.base, card.data.base_model, card.data.datasets) == (FRESH, None, None)
    assert "poems" in str(facts.data)
    assert str(tmp_path) not in card.content
    assert base_facts(str(tmp_path)).base == tmp_path.name
    assert base_facts("https://me:hunter2@example.org/m").base == "https:/example.org/m"


def test_settings_are_flags_to_give_again(tmp_path: Path) -> None:
    data = DataConfig(train_dir=(tmp_path / "a", tmp_path / "b"), train_weights=(3.0, 1.0))
    facts = card_facts(PretrainingConfig(data=data, run=RunConfig(seed=7)), None)
    assert facts.settings == ["--train-weights 3.0 1.0", "--seed 7"]


def test_card_of_a_checkpoint_from_before_says_what_is_not_recorded(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    converted(tmp_path / "run", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| trained | 7 updates," in card
    for what in ("base model", "training text", "objective", "update"):
        assert f"| {what} | not recorded |" in card
    assert "## Results" not in card


def test_head_that_was_never_trained_is_not_offered_for_filling_masks() -> None:
    card = card_of(base_facts("microsoft/mpnet-base"), fresh_head=True)
    assert "fill-mask" not in card.partition("---\n\n#")[2]
    assert "it fills no masks yet" in card


@pytest.mark.parametrize(("bits", "said"), [(7.5, "worth 1.50 bits"), (9.5, "worth nothing yet")])
def test_loss_is_compared_with_the_plateau(bits: float, said: str) -> None:
    assert said in card_of(CardFacts(updates=1, plateau_bits=9.0, valid_bits=bits))


def test_name_with_a_bar_stays_in_its_cell() -> None:
    card = card_of(CardFacts(updates=1, base="a|b\nc"))
    assert "| base model | a\\|b c |" in card
