"""One way in: what a path is shows in what is there."""

from pathlib import Path

import pytest
import torch
from tiny_models import (
    VOCAB_SIZE,
    converted,
    hugging_face_config,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from transformers import MPNetModel

from annotated_mpnet.checkpoints.checkpoint import BEST
from annotated_mpnet.conversion import export_to_hugging_face, load_any
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining


def assert_is(path: Path | str, model: MPNetForPretraining) -> None:
    loaded = load_any(str(path))
    wanted = model.state_dict()
    assert loaded.tensors.keys() == wanted.keys()
    assert all(torch.equal(loaded.tensors[name], wanted[name]) for name in wanted)


def test_our_checkpoint_is_read_with_its_tokenizer(tmp_path: Path) -> None:
    model = tiny_model()
    path = save_tiny_checkpoint(tmp_path / "run", 2500, "checkpoint2500", model)
    assert_is(path, model)
    assert load_any(str(path)).config == model.config
    assert load_any(str(path)).tokenizer == str(path / "tokenizer")


def test_old_file_name_means_our_directory(tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path / "run", 2500, "checkpoint2500", tiny_model())
    assert_is(f"{path}.pt", tiny_model())


def test_run_directory_gives_its_best_checkpoint_else_its_newest(tmp_path: Path) -> None:
    for update in (9, 10):
        save_tiny_checkpoint(tmp_path, update, f"checkpoint{update}", tiny_model(seed=update))
    assert_is(tmp_path, tiny_model(seed=10))
    save_tiny_checkpoint(tmp_path, 9, BEST, tiny_model(seed=9))
    assert_is(tmp_path, tiny_model(seed=9))


def test_damaged_checkpoint_is_an_error_and_no_other_is_taken(tmp_path: Path) -> None:
    path = save_tiny_checkpoint(tmp_path, 1, "checkpoint1", tiny_model())
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    for name in (path, tmp_path):
        with pytest.raises(CheckpointError, match="damaged"):
            load_any(str(name))
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_any(str(path))


def test_hugging_face_directory_is_read_with_its_tokenizer(tmp_path: Path) -> None:
    export_to_hugging_face(tiny_model(), tmp_path, tokenizer=tiny_tokenizer(), overwrite=False)
    assert_is(tmp_path, tiny_model())
    assert load_any(str(tmp_path)).tokenizer == str(tmp_path)


def test_sentence_transformers_directory_is_read(tmp_path: Path) -> None:
    with quiet_transformers():
        MPNetModel(hugging_face_config()).save_pretrained(tmp_path / "0_Transformer")
    loaded = load_any(str(tmp_path))
    assert loaded.tokenizer is None
    assert any("fresh" in note for note in loaded.notes)


def test_pt_file_is_read_and_names_its_tokenizer(tmp_path: Path) -> None:
    document = {
        "args": {"tokenizer_name": "microsoft/mpnet-base"},
        "model_states": tiny_model().state_dict(),
    }
    torch.save(document, tmp_path / "checkpoint5.pt")
    assert_is(tmp_path / "checkpoint5.pt", tiny_model())
    assert load_any(str(tmp_path / "checkpoint5.pt")).tokenizer == "microsoft/mpnet-base"
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert load_any(str(tmp_path / "checkpoint5.pt")).tokenizer == str(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "does not exist") for name in ("nothing.pt", "./nothing", "/nowhere", "a name")),
        ("someone/some-mpnet", "is not a directory, and the Hub does not provide it"),
    ],
)
def test_what_does_not_exist_is_one_line(name: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as refusal:
        load_any(name)
    assert "\n" not in str(refusal.value)


def test_directory_without_a_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_old.bak").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="holds no model") as refusal:
        load_any(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_padding_of_the_vocabulary_is_cut_without_saving_the_tokenizer_too(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    save_tiny_checkpoint(run, 7, "checkpoint7", tiny_model(tiny_config(vocab_size=128)))
    report = converted(run, tmp_path / "hf", save_tokenizer=False)
    assert [path.name for path in report.files] == [
        "README.md",
        "annotated_mpnet.json",
        "config.json",
        "model.safetensors",
    ]
    assert report.vocabulary_cut == 128 - VOCAB_SIZE


def test_weights_without_a_tokenizer_convert_only_when_asked_to(tmp_path: Path) -> None:
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="--no-save-tokenizer"):
        converted(tmp_path / "model.pt", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    report = converted(tmp_path / "model.pt", tmp_path / "hf", save_tokenizer=False)
    assert report.max_difference < 1e-5
