"""The initial weights: their source, the vocabulary, and the number of positions."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, MPNetModel

from annotated_mpnet.conversion import export_to_hugging_face
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.mpnet.config import ModelConfig, OptimizationConfig
from annotated_mpnet.mpnet.local_start import local_bias
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.mpnet.randomness import fold_in_seed
from annotated_mpnet.runs.initial_weights import build_model, check_export, longer_table
from annotated_mpnet.runs.texts import Text, read_text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.text.tokenizer import load_tokenizer
from networks import save_network, scrambled
from tiny_run import TinyText, changed, tiny_config, write_text

POSITIONS = "sentence_encoder.embed_positions.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(files: TinyText) -> PretrainingConfig:
    return tiny_config(files, Path("nowhere"))


@pytest.fixture(scope="module")
def text(config: PretrainingConfig) -> Text:
    return read_text(config.data, config.run.seed)


def other_network(text: Text, **changes: object) -> MPNetForPretraining:
    """Return a network that no seed gives."""
    values: dict[str, object] = {
        "vocab_size": text.vocabulary.size,
        "encoder_layers": 2,
        "encoder_embed_dim": 16,
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "max_positions": 32,
    }
    config = ModelConfig(**{**values, **changes})  # type: ignore[arg-type]
    return scrambled(MPNetForPretraining(config)).eval()


def exported(text: Text, directory: Path, model: MPNetForPretraining | None = None) -> Path:
    export_to_hugging_face(
        model or other_network(text), directory, tokenizer=text.tokenizer, overwrite=False
    )
    return directory


def saved(text: Text, run: Path, model: MPNetForPretraining) -> None:
    """Write a checkpoint of ours, `checkpoint7`."""
    save_network(run, 7, "checkpoint7", model, text.tokenizer.save_pretrained)


def started(
    config: PretrainingConfig, text: Text, source: Path, **changes: object
) -> tuple[MPNetForPretraining, str]:
    """Return the network that a run starts with, and its notes as one text."""
    wanted = changed(config, hf_model_path=str(source), **changes)
    model, notes = build_model(wanted, text)
    return model.eval(), "\n".join(notes)


def same_weights(ours: MPNetForPretraining, theirs: MPNetForPretraining) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# Ways in.


def test_without_a_source_weights_are_a_function_of_the_seed(
    config: PretrainingConfig, text: Text
) -> None:
    first, notes = build_model(config, text)
    torch.rand(7)
    assert notes == []
    assert same_weights(first, build_model(config, text)[0])
    assert not same_weights(first, build_model(changed(config, seed=1), text)[0])


def test_weights_come_from_a_hugging_face_directory(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    model, notes = started(config, text, exported(text, tmp_path / "hf"))
    assert same_weights(model, other_network(text))
    assert notes == f"starting from {tmp_path / 'hf'}: weights only, from step 0"


def test_weights_come_from_a_checkpoint_and_a_run_of_ours(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    model = other_network(text, normalize_before=True)
    saved(text, tmp_path, model)
    for source in (tmp_path, tmp_path / "checkpoint7", tmp_path / "checkpoint7.pt"):
        found, notes = started(config, text, source)
        assert same_weights(found, model)
        assert "--normalize-before" in notes


@pytest.mark.parametrize("option", ["resume_checkpoint", "hf_model_path"])
def test_pt_file_gives_weights_only_and_says_so(
    config: PretrainingConfig, text: Text, tmp_path: Path, option: str
) -> None:
    path = tmp_path / "checkpoint2500.pt"
    arguments = {"encoder_attention_heads": 2, "tokenizer_name": config.data.tokenizer_name}
    torch.save({"model_states": other_network(text).state_dict(), "args": arguments}, path)
    value = path if option == "resume_checkpoint" else str(path)
    model, notes = build_model(changed(config, **{option: value}), text)
    assert same_weights(model, other_network(text))
    assert notes == [f"starting from {path}: weights only, from step 0"]
    both = changed(config, resume_checkpoint=path, hf_model_path="some/model")
    assert build_model(both, text)[1] == [
        f"--hf-model-path some/model is ignored: the weights are those of {path}",
        *notes,
    ]


def test_pt_file_that_would_run_code_is_refused_with_or_without_trust(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    class Trace:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return shutil.rmtree, (str(tmp_path / "precious"),)

    (tmp_path / "precious").mkdir()
    torch.save({"model": other_network(text).state_dict(), "args": Trace()}, tmp_path / "model.pt")
    wanted = changed(config, resume_checkpoint=tmp_path / "model.pt", trust_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"nothing was run.*torch\.save"):
        build_model(wanted, text)
    assert (tmp_path / "precious").exists()


def test_trust_is_said_to_have_no_effect(config: PretrainingConfig, text: Text) -> None:
    _, notes = build_model(changed(config, trust_checkpoint=True), text)
    assert len(notes) == 1
    assert "--trust-checkpoint has no effect" in notes[0]


def test_encoder_without_a_head_gets_a_fresh_one_that_is_said(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    with quiet_transformers():
        MPNetModel.from_pretrained(exported(text, tmp_path / "hf")).save_pretrained(tmp_path / "e")
    model, notes = started(config, text, tmp_path / "e", head_bias="zeros")
    assert "the head starts from fresh weights" in notes
    assert torch.equal(
        model.sentence_encoder.layers[1].fc1.weight,
        other_network(text).sentence_encoder.layers[1].fc1.weight,
    )
    assert model.lm_head.bias.count_nonzero() == 0


def test_new_head_starts_from_frequencies_and_a_loaded_one_keeps_its_bias(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    config = changed(config, head_bias="auto")
    assert config.optimization == dataclasses.replace(
        config.optimization, head_bias=OptimizationConfig().head_bias
    )
    new, notes = build_model(config, text)
    assert notes == []
    assert same_weights(new, build_model(changed(config, head_bias="frequencies"), text)[0])
    with quiet_transformers():
        hf = exported(text, tmp_path / "hf")
        MPNetModel.from_pretrained(hf).save_pretrained(tmp_path / "encoder")
    model, notes = started(config, text, tmp_path / "encoder")
    assert torch.equal(model.lm_head.bias, new.lm_head.bias)
    # A loaded bias is kept, even zeros.
    tensors = load_file(hf / "model.safetensors")
    for bias in (tensors["lm_head.bias"], torch.zeros(text.vocabulary.size)):
        save_file(tensors | {"lm_head.bias": bias}, hf / "model.safetensors", {"format": "pt"})
        kept, notes = started(config, text, hf)
        assert torch.equal(kept.lm_head.bias, bias)
        assert "head-bias" not in notes


def test_head_starts_from_zeros_where_there_is_no_text_to_count_and_that_is_said(
    config: PretrainingConfig, text: Text
) -> None:
    config = changed(config, head_bias="auto")
    uncounted = dataclasses.replace(text)
    uncounted.__dict__["training_counts"] = None
    model, notes = build_model(config, uncounted)
    assert model.lm_head.bias.count_nonzero() == 0
    assert "the head's bias starts from zeros" in notes[0]
    with pytest.raises(ConfigError, match="--head-bias frequencies needs text to count"):
        build_model(changed(config, head_bias="frequencies"), uncounted)
    # A resumed run already has its head.
    assert build_model(changed(config, resume=True), uncounted)[1] == []


def test_frequencies_go_into_a_fresh_head_and_never_into_a_trained_one(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    model, notes = started(config, text, hf, head_bias="frequencies")
    assert "--head-bias frequencies has no effect" in notes
    assert same_weights(model, other_network(text))
    with quiet_transformers():
        MPNetModel.from_pretrained(hf).save_pretrained(tmp_path / "encoder")
    fresh, notes = started(config, text, tmp_path / "encoder", head_bias="frequencies")
    assert "no effect" not in notes
    assert float(fresh.lm_head.bias.detach().exp().sum()) == pytest.approx(1.0, abs=1e-4)


def table_of(model: MPNetForPretraining) -> torch.Tensor:
    table = model.sentence_encoder.relative_attention_bias
    assert table is not None
    return table.weight.detach()


def test_normal_is_the_start_of_the_paper_and_local_adds_to_it(
    config: PretrainingConfig, text: Text
) -> None:
    normal, _ = build_model(changed(config, relative_bias_init="normal"), text)
    torch.manual_seed(fold_in_seed(config.run.seed, "weights") % 2**63)
    assert same_weights(normal, MPNetForPretraining(normal.config))
    local, notes = build_model(changed(config, relative_bias_init="local"), text)
    assert not notes
    torch.testing.assert_close(table_of(local), table_of(normal) + local_bias(32, 128, 2))
    with torch.no_grad():
        table_of(local).copy_(table_of(normal))
    assert same_weights(local, normal)


def test_the_start_is_local_unless_there_is_no_table(config: PretrainingConfig, text: Text) -> None:
    model, _ = build_model(config, text)
    assert same_weights(model, build_model(changed(config, relative_bias_init="local"), text)[0])
    without = changed(config, relative_attention_num_buckets=0)
    without.validate()
    model, notes = build_model(without, text)
    assert model.sentence_encoder.relative_attention_bias is None
    assert not notes
    with pytest.raises(ConfigError, match=r"--relative-bias-init is local.*num-buckets 0"):
        changed(without, relative_bias_init="local").validate()


def test_loaded_weights_keep_their_bias_and_a_flag_without_effect_is_said(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    model, notes = started(config, text, hf)
    assert same_weights(model, other_network(text))
    assert "relative-bias-init" not in notes
    model, notes = started(config, text, hf, relative_bias_init="local")
    assert same_weights(model, other_network(text))
    assert "--relative-bias-init local has no effect" in notes


# The architecture.


def test_architecture_of_the_source_replaces_the_flags_and_the_note_lists_them(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    model, notes = started(config, text, hf, encoder_layers=5, normalize_before=True, dropout=0.3)
    assert model.config.encoder_layers == 2
    assert model.config.dropout == 0.3, "dropout is the run's"
    assert model.config.activation_dropout == 0.1
    assert "its architecture replaces the flags" in notes
    assert "--encoder-layers 2 --no-normalize-before" in notes


def test_mask_token_is_the_tokenizers(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    model, _ = started(config, text, exported(text, tmp_path / "hf"))
    assert model.config.mask_token_id == text.vocabulary.mask_id


def test_other_architecture_is_refused(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    tiny = BertConfig(
        vocab_size=text.vocabulary.size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    with quiet_transformers():
        BertForMaskedLM(tiny).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="model_type 'bert', expected 'mpnet'"):
        started(config, text, tmp_path / "bert")


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.999])
def test_truncated_source_is_refused(
    config: PretrainingConfig, text: Text, tmp_path: Path, kept: float
) -> None:
    weights = exported(text, tmp_path / "hf") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match="cannot be read"):
        started(config, text, tmp_path / "hf")


def test_source_with_a_tensor_missing_is_refused_by_its_name(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    weights = exported(text, tmp_path / "hf") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["mpnet.encoder.layer.1.output.dense.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \('mpnet\.encoder\.layer\.1\.output"):
        started(config, text, tmp_path / "hf")


def test_source_with_another_vocabulary_is_refused_with_the_way_out(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    path = hf / "config.json"
    path.write_text(
        path.read_text().replace(f'"vocab_size": {text.vocabulary.size}', '"vocab_size": 300')
    )
    tensors = load_file(hf / "model.safetensors")
    for name in ("mpnet.embeddings.word_embeddings.weight", "lm_head.bias"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"have 300 tokens.*--tokenizer-name {hf}") as refusal:
        started(config, text, hf)
    assert "\n" not in str(refusal.value)


def test_two_swapped_ids_in_a_vocabulary_of_the_same_size_are_refused(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    description = json.loads((hf / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = description["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (hf / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    message = rf"2 of 400 tokens have another id.*--tokenizer-name {hf}"
    with pytest.raises(CheckpointError, match=message) as refusal:
        started(config, text, hf)
    assert "\n" not in str(refusal.value)


def test_same_vocabulary_under_another_normalizer_is_refused(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    description = json.loads((hf / "tokenizer.json").read_text(encoding="utf-8"))
    description["normalizer"]["normalizers"][0]["lowercase"] = False
    (hf / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cut the text .* into other tokens"):
        started(config, text, hf)


def test_special_token_of_another_purpose_is_refused(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    path = hf / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["cls_token"], values["sep_token"] = values["sep_token"], values["cls_token"]
    path.write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"begin, padding, end and mask have the ids \[2, 1, 0, 399\]"
    ):
        started(config, text, hf)


def test_source_without_a_tokenizer_is_taken_by_size_and_that_is_said(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    for arguments, said in (
        ({}, "brings no tokenizer: cannot check that"),
        ({"tokenizer_name": "some/name"}, "brings no tokenizer but a name, 'some/name'"),
    ):
        path = tmp_path / "model.pt"
        torch.save({"model": other_network(text).state_dict(), "args": arguments}, path)
        _, notes = started(config, text, path)
        assert said in notes
        assert "cannot check" in notes


def test_padding_id_is_compared_where_there_is_no_tokenizer(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    model = other_network(text, pad_token_id=0)
    torch.save({"model": model.state_dict(), "args": {"max_positions": 32}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="padding has the id 0 in the weights, 1 in"):
        started(config, text, tmp_path / "model.pt")


@pytest.mark.parametrize(("size", "fits"), [(408, True), (405, False), (640, False)])
def test_padding_of_the_vocabulary_is_dropped_and_other_sizes_are_refused(
    config: PretrainingConfig, text: Text, tmp_path: Path, size: int, fits: bool
) -> None:
    assert text.vocabulary.size == 400
    model = other_network(text, vocab_size=size)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pt")
    if not fits:
        with pytest.raises(CheckpointError, match=f"have {size} tokens, the tokenizer 400"):
            started(config, text, tmp_path / "model.pt")
        return
    found, _ = started(config, text, tmp_path / "model.pt")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = model.logits(model.encode(ids))[..., :400]
        torch.testing.assert_close(found.logits(found.encode(ids)), wanted)


# Positions.


def test_longer_positions_leave_shorter_texts_as_they_were(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    model, notes = started(config, text, hf, max_tokens=80)
    assert model.config.max_positions == 80
    assert "positions: 32 became 80" in notes
    assert "--max-positions" not in notes
    ids = torch.arange(5, 5 + 31)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.encode(ids), other_network(text).encode(ids))
        assert model.encode(torch.arange(5, 85)[None]).isfinite().all()


def test_new_positions_repeat_the_inner_ones_and_the_ends_stay_the_ends() -> None:
    table_TD = torch.arange(40.0).view(10, 4)
    longer_TD = longer_table(table_TD, 30)
    assert longer_TD.shape == (30, 4)
    assert torch.equal(longer_TD[:9], table_TD[:9])
    assert torch.equal(longer_TD[9:17], table_TD[1:9])
    assert torch.equal(longer_TD[-1], table_TD[-1])
    ends = [(longer_TD == end).all(dim=1).sum() for end in (table_TD[0], table_TD[-1])]
    assert ends == [1, 1]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_even_the_shortest_table_can_become_longer(length: int) -> None:
    table_TD = torch.rand(length, 2)
    longer_TD = longer_table(table_TD, 9)
    assert longer_TD.shape == (9, 2)
    assert torch.equal(longer_TD[-1], table_TD[-1])


def test_sinusoids_reach_further_without_changes(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    model = other_network(text, position_embedding="sinusoidal")
    saved(text, tmp_path, model)
    longer, notes = started(config, text, tmp_path, max_positions=64)
    assert "32 became 64, sinusoids" in notes
    fresh = other_network(text, position_embedding="sinusoidal", max_positions=64)
    ids = torch.arange(5, 69)[None]
    with torch.no_grad():
        torch.testing.assert_close(longer.encode(ids), fresh.encode(ids))


def test_shorter_sequences_keep_the_table_of_the_source(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    model, notes = started(config, text, hf, max_tokens=16)
    assert model.config.max_positions == 32
    assert "--max-positions 32" in notes


# Exports, checked before training.


def test_export_that_cannot_be_is_said_before_training(
    config: PretrainingConfig, text: Text
) -> None:
    flags = changed(config, normalize_before=True, activation_fn="relu")
    model, _ = build_model(flags, text)
    (warning,) = check_export(text.vocabulary, model.config)
    assert "normalize_before is True" in warning
    assert "relu" in warning
    assert check_export(text.vocabulary, build_model(config, text)[0].config) == []


def test_padding_id_is_refused_where_an_export_was_promised(
    config: PretrainingConfig, text: Text
) -> None:
    moved = dataclasses.replace(
        text, vocabulary=dataclasses.replace(text.vocabulary, pad_id=0, cls_id=1)
    )
    model, _ = build_model(config, moved)
    with pytest.raises(ConfigError, match=r"padding has the id 0.*--no-export-hf"):
        check_export(moved.vocabulary, model.config)


def test_export_start_export_gives_the_same_bytes(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    first = exported(text, tmp_path / "first")
    model, _ = started(config, text, first)
    second = exported(text, tmp_path / "second", model)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert "tokenizer.json" in names
    names.remove("README.md")  # which has the directory's name in it
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_tokenizer_that_the_export_saved_is_the_runs_own(
    config: PretrainingConfig, text: Text, tmp_path: Path
) -> None:
    hf = exported(text, tmp_path / "hf")
    assert load_tokenizer(str(hf)).get_vocab() == text.tokenizer.get_vocab()
    _, notes = started(changed(config, tokenizer_name=str(hf)), text, hf)
    assert "cannot be checked" not in notes
