"""Every way out: each kind of checkpoint converts, and others can use what comes of it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_models import (
    MAX_POSITIONS,
    VOCAB_SIZE,
    convert_to_hf,
    converted,
    hugging_face_config,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForMaskedLM, AutoTokenizer, MPNetModel

from annotated_mpnet.conversion import export_to_hugging_face
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

SENTENCES = ["The sea, the SEA.", "a", "bing " * 100]


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


# Every kind of checkpoint.


@pytest.mark.parametrize("name", ["run", "run/checkpoint7", "run/checkpoint7.pt"])
def test_runs_and_checkpoints_of_ours_convert(tmp_path: Path, name: str) -> None:
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    export_to_hugging_face(
        tiny_model(), tmp_path / "wanted", tokenizer=tiny_tokenizer(), overwrite=False
    )
    found = weights_in(converted(tmp_path / name, tmp_path / "hf").directory)
    wanted = weights_in(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[each], wanted[each]) for each in wanted)


@pytest.mark.parametrize(
    ("weights", "prefix"), [("model", "decoder."), ("model_states", "_orig_mod.")]
)
def test_pt_files_of_microsoft_and_of_annotated_mpnet_convert(
    tmp_path: Path, weights: str, prefix: str
) -> None:
    state = {f"{prefix}{name}": each for name, each in tiny_model().state_dict().items()}
    torch.save({weights: state, "args": {"dropout": 0.2}}, tmp_path / "model.pt")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    converted(tmp_path / "model.pt", tmp_path / "hf")
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    table = opened.mpnet.embeddings.word_embeddings.weight
    assert torch.equal(table, tiny_model().sentence_encoder.embed_tokens.weight)
    assert opened.config.hidden_dropout_prob == 0.2


def test_hugging_face_encoder_converts_with_a_note_on_its_fresh_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet_transformers():
        MPNetModel(hugging_face_config()).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    converted(tmp_path / "encoder", tmp_path / "hf")
    assert "head starts from fresh weights" in capsys.readouterr().out
    before, after = weights_in(tmp_path / "encoder"), weights_in(tmp_path / "hf")
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(before[name], after[f"mpnet.{name}"])


def test_command_refuses_what_cannot_be_represented_with_exit_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All reasons: test_export_to_hugging_face.py.
    model = MPNetForPretraining(tiny_config(normalize_before=True))
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", model)
    assert convert_to_hf(tmp_path / "run", tmp_path / "hf") == 2
    said = capsys.readouterr().err
    assert "normalize_before is True" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_command_refuses_a_directory_in_use_with_exit_2_until_told_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    paths = tmp_path / "run", tmp_path / "hf"
    assert convert_to_hf(*paths) == 0
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"precious")
    assert convert_to_hf(*paths) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == b"precious"
    assert convert_to_hf(*paths, "--overwrite") == 0
    assert len(weights_in(tmp_path / "hf")) > 30


def test_a_checkpoint_is_all_that_the_command_needs(
    tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing of the machine that trained it: neither the tokenizer's directory nor a cache.
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    assert convert_to_hf(tmp_path / "run" / "checkpoint7.pt", tmp_path / "hf") == 0
    assert "logits differ by" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("the sea")["input_ids"] == tiny_tokenizer()("the sea")["input_ids"]
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    logits = model(**tokenizer("the <mask>", return_tensors="pt")).logits
    assert logits.shape == (1, 4, VOCAB_SIZE)


# sentence-transformers.


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "hf"
    export_to_hugging_face(tiny_model(), directory, tokenizer=tiny_tokenizer(), overwrite=False)
    return directory


def test_export_opens_in_sentence_transformers_and_encodes_the_mean_of_our_hidden_states(
    exported: Path,
) -> None:
    with quiet_transformers():
        opened = SentenceTransformer(str(exported), device="cpu")
    found = opened.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    batch = tiny_tokenizer()(
        SENTENCES, padding=True, truncation=True, max_length=MAX_POSITIONS, return_tensors="pt"
    )
    mask_BL1 = batch["attention_mask"][:, :, None]
    with torch.no_grad():
        hidden_BLD = tiny_model().eval().encode(batch["input_ids"], batch["attention_mask"])
    wanted_BD = (hidden_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
    torch.testing.assert_close(found.cpu(), wanted_BD, atol=1e-4, rtol=0)


def test_sentence_transformers_cuts_at_the_last_position_of_the_table(exported: Path) -> None:
    with quiet_transformers():
        opened = SentenceTransformer(str(exported), device="cpu")
    assert opened.max_seq_length == MAX_POSITIONS


def test_what_sentence_transformers_saves_of_an_export_is_a_way_in_again(
    exported: Path, tmp_path: Path
) -> None:
    with quiet_transformers():
        SentenceTransformer(str(exported), device="cpu").save(str(tmp_path / "sentences"))
    assert json.loads((tmp_path / "sentences" / "modules.json").read_text())
    found = weights_in(converted(tmp_path / "sentences", tmp_path / "hf").directory)
    wanted = weights_in(exported)
    encoder = [name for name in wanted if name.startswith("mpnet.")]
    assert all(torch.equal(found[name], wanted[name]) for name in encoder)


def test_export_claims_to_be_a_language_model_and_nothing_more(
    exported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not (exported / "modules.json").exists()
    with caplog.at_level(logging.WARNING, logger="sentence_transformers"), quiet_transformers():
        SentenceTransformer(str(exported), device="cpu")
    assert caplog.records == []
