"""Hugging Face -> ours: the right weights, all of them, and no code run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    VOCAB_SIZE,
    LeavesTrace,
    hugging_face_config,
    padded_batch,
    tiny_config,
    tiny_model,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MPNetForMaskedLM,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from annotated_mpnet.conversion import export_to_hugging_face, hugging_face, load_any
from annotated_mpnet.conversion.foreign import expected_tensors
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining


def saved(model: PreTrainedModel, directory: Path) -> Path:
    with quiet_transformers():
        model.save_pretrained(directory)
    return directory


def loaded(directory: Path) -> MPNetForPretraining:
    config, tensors, *_ = load_any(str(directory))
    model = MPNetForPretraining(config)
    model.load_state_dict(tensors)
    return model.eval()


@pytest.fixture
def masked_lm(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(MPNetForMaskedLM(hugging_face_config()), tmp_path / "masked_lm")


def test_import_export_gives_the_same_bytes(masked_lm: Path, tmp_path: Path) -> None:
    export_to_hugging_face(loaded(masked_lm), tmp_path / "ours", tokenizer=None, overwrite=False)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (masked_lm / name).read_bytes()


def test_export_import_gives_back_network_and_numbers(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(layer_norm_eps=2e-5, dropout=0.3, encoder_layers=11))
    export_to_hugging_face(model, tmp_path / "hf", tokenizer=None, overwrite=False)
    config, tensors, notes, *_ = load_any(str(tmp_path / "hf"))
    # Hugging Face's network knows no dropout inside the feed-forward layer.
    assert config == dataclasses.replace(model.config, activation_dropout=0.0)
    assert notes == []
    wanted = model.state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_encoder_only_model_computes_the_same_and_gets_a_fresh_head_with_a_note(
    tmp_path: Path,
) -> None:
    theirs = MPNetModel(hugging_face_config()).eval()
    directory = saved(theirs, tmp_path / "encoder")
    config, tensors, notes, *_ = load_any(str(directory))
    assert any("head starts from fresh weights" in note for note in notes)
    assert any("pooler was left out" in note for note in notes)
    model = loaded(directory)
    input_ids, attention_mask = padded_batch(VOCAB_SIZE, config.max_positions)
    with torch.no_grad():
        wanted = theirs(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = model.encode(input_ids, attention_mask)
    assert (hidden - wanted)[attention_mask == 1].abs().max() < 1e-4
    assert tensors["lm_head.bias"].count_nonzero() == 0
    assert torch.equal(tensors["lm_head.dense.weight"], torch.eye(16))


def test_fresh_head_makes_logits_as_small_as_those_of_a_new_network(tmp_path: Path) -> None:
    directory = saved(MPNetModel(hugging_face_config()), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    # Long embeddings, as training makes them; a new network's are 0.02 sqrt(16) = 0.08 long.
    tensors["embeddings.word_embeddings.weight"] *= 40
    save_file(tensors, directory / "model.safetensors")
    model, ids = loaded(directory), torch.arange(5, 35)[None]
    new = MPNetForPretraining(model.config).eval()
    with torch.no_grad():
        spread, wanted = (float(each.logits(each.encode(ids)).std()) for each in (model, new))
    assert wanted / 2 < spread < wanted * 2


def test_fresh_head_is_the_same_each_time_and_draws_nothing(tmp_path: Path) -> None:
    directory = saved(MPNetModel(hugging_face_config()), tmp_path)
    before = torch.get_rng_state()
    first, second = load_any(str(directory))[1], load_any(str(directory))[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_head_that_an_encoder_lacks_is_less_than_a_hundredth_of_the_network() -> None:
    sizes = {name: each.numel() for name, each in expected_tensors(ModelConfig()).items()}
    head = sum(size for name, size in sizes.items() if name.startswith("lm_head."))
    assert round(head / 1e6, 1) == 0.6
    assert head < 0.01 * sum(sizes.values())


@pytest.mark.parametrize("place", ["", "0_Transformer"])
@pytest.mark.parametrize("has_modules", [True, False])
def test_network_in_a_sentence_transformers_directory_is_found(
    tmp_path: Path, place: str, has_modules: bool
) -> None:
    theirs = saved(MPNetModel(hugging_face_config(), add_pooling_layer=False), tmp_path / place)
    wanted = load_file(theirs / "model.safetensors")["embeddings.word_embeddings.weight"]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 16}')
    if has_modules:
        modules = [
            {"idx": 0, "path": place, "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    _, tensors, *_ = load_any(str(tmp_path))
    assert torch.equal(tensors["sentence_encoder.embed_tokens.weight"], wanted)


def test_modules_that_lead_out_of_the_directory_are_not_followed(
    masked_lm: Path, tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "modules.json").write_text(
        json.dumps([{"path": "../masked_lm", "type": "x.Transformer"}])
    )
    with pytest.raises(CheckpointError, match="inside the directory"):
        load_any(str(inner))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (BertForMaskedLM, BertConfig),
        (RobertaForMaskedLM, RobertaConfig),
    ],
)
def test_other_architectures_are_refused_by_name(
    tmp_path: Path, model: type[PreTrainedModel], kind: type[BertConfig]
) -> None:
    tiny = kind(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    directory = saved(model(tiny), tmp_path)
    with pytest.raises(CheckpointError, match=f"model_type '{kind.model_type}', expected 'mpnet'"):
        load_any(str(directory))


@pytest.mark.parametrize(
    "missing",
    [
        "mpnet.encoder.layer.1.attention.attn.k.bias",
        "mpnet.embeddings.position_embeddings.weight",
        "lm_head.dense.weight",
        "lm_head.bias",
    ],
)
def test_missing_tensor_is_named(masked_lm: Path, missing: str) -> None:
    tensors = load_file(masked_lm / "model.safetensors")
    del tensors[missing]
    save_file(tensors, masked_lm / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"of 42 tensors: 1 missing \\('{missing}'\\)"):
        load_any(str(masked_lm))


def test_network_that_lost_its_head_is_not_taken_for_an_encoder(masked_lm: Path) -> None:
    tensors = load_file(masked_lm / "model.safetensors")
    headless = {name: each for name, each in tensors.items() if name.startswith("mpnet.")}
    save_file(headless, masked_lm / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"5 missing \('lm_head"):
        load_any(str(masked_lm))


def test_unexpected_tensor_is_named_with_its_text_escaped(masked_lm: Path) -> None:
    tensors = load_file(masked_lm / "model.safetensors")
    save_file({**tensors, "\x1b[31mnew": torch.ones(1)}, masked_lm / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected \('\\x1b\[31mnew'\)"):
        load_any(str(masked_lm))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, r"shape .*expected .*32"),
        ({"num_hidden_layers": 3}, "16 missing"),
        ({"num_hidden_layers": 1}, "16 unexpected"),
        ({"max_position_embeddings": 514}, "position_embeddings.weight has shape"),
        ({"relative_attention_num_buckets": 64}, "relative_attention_num_buckets is 64, not 32"),
        ({"hidden_act": "relu"}, "hidden_act is relu, not gelu"),
        ({"pad_token_id": 0}, "pad_token_id is 0, not 1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"num_attention_heads": 5}, "cannot be read.*not a multiple"),
        ({"vocab_size": "many"}, "cannot be read.*vocab_size"),
    ],
)
def test_configuration_of_another_model_is_refused(
    masked_lm: Path, change: dict[str, object], message: str
) -> None:
    path = masked_lm / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_any(str(masked_lm))
    assert "\n" not in str(refusal.value)


def test_what_the_configuration_leaves_out_is_the_default_of_the_class(masked_lm: Path) -> None:
    path = masked_lm / "config.json"
    values = json.loads(path.read_text())
    del values["layer_norm_eps"]
    path.write_text(json.dumps(values))
    assert load_any(str(masked_lm))[0].layer_norm_eps == 1e-12


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000, "{}"])
def test_broken_configuration_is_one_line(masked_lm: Path, text: str) -> None:
    (masked_lm / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_any(str(masked_lm))


@pytest.mark.parametrize("size", [0, 1, 8, 1000, -1])
def test_truncated_weights_are_refused(masked_lm: Path, size: int) -> None:
    path = masked_lm / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_any(str(masked_lm))


def test_header_that_claims_exabytes_is_refused(masked_lm: Path) -> None:
    (masked_lm / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_any(str(masked_lm))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(
    masked_lm: Path, tmp_path: Path, name: str
) -> None:
    (masked_lm / "model.safetensors").unlink()
    torch.save({"mpnet.x": LeavesTrace(tmp_path / "canary")}, masked_lm / name)
    with pytest.raises(CheckpointError):
        load_any(str(masked_lm))
    assert not (tmp_path / "canary").exists()


def test_weights_that_are_not_finite_are_refused_by_name(masked_lm: Path) -> None:
    tensors = load_file(masked_lm / "model.safetensors")
    tensors["lm_head.dense.bias"][3] = float("inf")
    save_file(tensors, masked_lm / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.dense\.bias holds values"):
        load_any(str(masked_lm))


def test_bin_of_an_old_version_is_read(masked_lm: Path) -> None:
    config, wanted, *_ = load_any(str(masked_lm))
    tensors: dict[str, torch.Tensor] = load_file(masked_lm / "model.safetensors")
    (masked_lm / "model.safetensors").unlink()
    tensors["mpnet.embeddings.position_ids"] = torch.arange(42)[None]
    tensors["lm_head.decoder.weight"] = tensors["mpnet.embeddings.word_embeddings.weight"]
    tensors["lm_head.decoder.bias"] = tensors.pop("lm_head.bias")
    torch.save(tensors, masked_lm / "pytorch_model.bin")
    again, found, notes, *_ = load_any(str(masked_lm))
    assert (again, notes) == (config, [])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_old_names_of_norms_are_read(masked_lm: Path) -> None:
    expected = loaded(masked_lm).state_dict()
    file = masked_lm / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    found = loaded(masked_lm).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_decoder_that_is_not_tied_is_refused(masked_lm: Path) -> None:
    tensors = load_file(masked_lm / "model.safetensors")
    tensors["lm_head.decoder.weight"] = tensors["mpnet.embeddings.word_embeddings.weight"] + 1
    save_file(tensors, masked_lm / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.weight differs"):
        load_any(str(masked_lm))


def test_half_precision_becomes_float32_exactly(tmp_path: Path) -> None:
    directory = saved(MPNetForMaskedLM(hugging_face_config()).half(), tmp_path)
    theirs = load_file(directory / "model.safetensors")
    tensor = load_any(str(directory))[1]["lm_head.dense.weight"]
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, theirs["lm_head.dense.weight"].float())


@pytest.mark.parametrize("safe", [True, False])
def test_hub_is_asked_for_the_pickle_only_where_there_is_nothing_safer(
    masked_lm: Path, monkeypatch: pytest.MonkeyPatch, safe: bool
) -> None:
    tensors = load_file(masked_lm / "model.safetensors")
    if not safe:
        (masked_lm / "model.safetensors").unlink()
    asked: list[str] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/some-mpnet"
        asked.extend(allow_patterns)
        if "pytorch_model*.bin" in allow_patterns:
            torch.save(tensors, masked_lm / "pytorch_model.bin")
        return str(masked_lm)

    monkeypatch.setattr(hugging_face, "snapshot_download", snapshot)
    load_any("someone/some-mpnet")
    assert ("pytorch_model*.bin" in asked) is not safe


def test_directory_without_weights_is_one_line(masked_lm: Path) -> None:
    (masked_lm / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_any(str(masked_lm))
