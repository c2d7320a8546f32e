"""Every way out: each kind of checkpoint converts, and others can use what comes of it."""

import json
import logging
import os
import socket
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_models import (
    MAX_POSITIONS,
    hugging_face_config,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForMaskedLM, AutoTokenizer, MPNetModel

from annotated_mpnet import cli
from annotated_mpnet.conversion import convert_checkpoint, export_to_hugging_face
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

SENTENCES = ["The sea, the SEA.", "a", "bing " * 100]


def converted(source: Path | str, target: Path) -> Path:
    convert_checkpoint(
        Path(source), target, save_tokenizer=True, overwrite=False, pytorch_bin=False
    )
    return target


def convert_to_hf(*arguments: object) -> int | str | None:
    """Run the console command in this process, and return what it exits with."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["convert-to-hf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            cli.convert()
    return ending.value.code


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


# Every kind of checkpoint.


@pytest.mark.parametrize("name", ["run", "run/checkpoint7", "run/checkpoint7.pt"])
def test_runs_and_checkpoints_of_ours_convert(tmp_path: Path, name: str) -> None:
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    export_to_hugging_face(
        tiny_model(), tmp_path / "wanted", tokenizer=tiny_tokenizer(), overwrite=False
    )
    found = weights_in(converted(tmp_path / name, tmp_path / "hf"))
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
    opened = AutoModelForMaskedLM.from_pretrained(converted(tmp_path / "model.pt", tmp_path / "hf"))
    table = opened.mpnet.embeddings.word_embeddings.weight
    assert torch.equal(table, tiny_model().sentence_encoder.embed_tokens.weight)
    assert opened.config.hidden_dropout_prob == 0.2


def test_hugging_face_encoder_converts_and_its_fresh_head_is_said(
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64, not 32"),
        ({"relative_attention_max_distance": 256}, "max_distance is 256, not 128"),
        ({"normalize_before": True}, "normalize_before is True"),
        ({"position_embedding": "sinusoidal"}, "sinusoidal, not learned"),
        ({"activation_fn": "relu"}, "relu, not gelu"),
    ],
)
def test_command_refuses_what_cannot_be_represented_with_exit_2_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    reason: str,
) -> None:
    model = MPNetForPretraining(tiny_config(**changes))
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", model)
    code = convert_to_hf(
        "--mpnet-checkpoint-path", tmp_path / "run", "--hf-model-folder-path", tmp_path / "hf"
    )
    said = capsys.readouterr().err
    assert code == 2
    assert reason in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_command_refuses_a_directory_in_use_with_exit_2_until_told_to_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    flags = (
        *("--mpnet-checkpoint-path", tmp_path / "run"),
        *("--hf-model-folder-path", tmp_path / "hf"),
    )
    assert convert_to_hf(*flags) in (0, None)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"precious")
    assert convert_to_hf(*flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == b"precious"
    assert convert_to_hf(*flags, "--overwrite") in (0, None)
    assert len(weights_in(tmp_path / "hf")) > 30


def test_offline_a_checkpoint_is_all_that_the_command_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    # Both: the setting that users have, and no way around it.
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    # Nothing of the machine that trained it: neither the tokenizer's directory nor a cache.
    code = convert_to_hf(
        "--mpnet-checkpoint-path", tmp_path / "run", "--hf-model-folder-path", tmp_path / "hf"
    )
    assert code in (0, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("the sea")["input_ids"] == tiny_tokenizer()("the sea")["input_ids"]


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
    found = weights_in(converted(tmp_path / "sentences", tmp_path / "hf"))
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
