"""`.pt` files -> ours: Microsoft's and annotated-mpnet's, without running what is in them."""

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import MAX_POSITIONS, LeavesTrace, tiny_config, tiny_model

from annotated_mpnet.conversion import load_any
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

Weights = dict[str, torch.Tensor]


def weights_of(model: MPNetForPretraining, prefix: str = "") -> Weights:
    """Return a model's state as fairseq saves it: the tied embedding twice."""
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    state[f"{prefix}lm_head.weight"] = model.sentence_encoder.embed_tokens.weight.detach()
    return state


def arguments_of(config: ModelConfig) -> dict[str, object]:
    names = ("encoder_layers", "encoder_embed_dim", "encoder_attention_heads", "max_positions")
    more = ("dropout", "attention_dropout", "activation_dropout", "activation_fn")
    return {name: vars(config)[name] for name in (*names, *more, "normalize_before")}


def assert_loads_as(path: Path, model: MPNetForPretraining) -> None:
    config, tensors, *_ = load_any(str(path))
    assert config == model.config
    wanted = model.state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_microsofts_file_loads_with_its_namespace_and_stopwatches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What fairseq's own module has, as far as a pickle sees it: a class of that name, and values.
    meters = ModuleType("fairseq.meters")
    meter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    monkeypatch.setattr(meters, "AverageMeter", meter, raising=False)
    monkeypatch.setitem(sys.modules, "fairseq", ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, "fairseq.meters", meters)
    watch = meter()
    watch.avg = 1.5
    model = tiny_model(tiny_config(dropout=0.2, activation_dropout=0.0))
    document = {
        "args": Namespace(**arguments_of(model.config), encoder_ffn_embed_dim=32, arch="mpnet"),
        "model": weights_of(model, "decoder."),
        "optimizer_history": [{"criterion_name": "MaskedPermutationCriterion"}],
        "extra_state": {"train_meters": {"train_loss": watch}, "val_loss": None},
    }
    torch.save(document, tmp_path / "checkpoint_best.pt")
    monkeypatch.delitem(sys.modules, "fairseq.meters")
    monkeypatch.delitem(sys.modules, "fairseq")
    assert_loads_as(tmp_path / "checkpoint_best.pt", model)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("kind", [dict, Namespace])
def test_annotated_mpnets_file_loads_compiled_or_not(
    tmp_path: Path, prefix: str, kind: type[Namespace]
) -> None:
    model = tiny_model(tiny_config(activation_fn="relu", normalize_before=True))
    document = {
        "args": kind(**arguments_of(model.config), relative_attention_max_distance=128),
        "model_states": weights_of(model, prefix),
        "steps": 2500,
        "rng_state": {"torch": torch.get_rng_state()},
    }
    torch.save(document, tmp_path / "checkpoint2500.pt")
    assert_loads_as(tmp_path / "checkpoint2500.pt", model)


def test_newer_fairseq_keeps_its_arguments_in_cfg(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(activation_fn="tanh"))
    cfg = {"common": {"seed": 1}, "model": Namespace(**arguments_of(model.config))}
    torch.save({"args": None, "cfg": cfg, "model": weights_of(model)}, tmp_path / "model.pt")
    assert_loads_as(tmp_path / "model.pt", model)


def test_without_arguments_what_no_tensor_shows_is_assumed_with_a_note(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    torch.save({"model": weights_of(model)}, tmp_path / "model.pt")
    assert_loads_as(tmp_path / "model.pt", model)
    notes = load_any(str(tmp_path / "model.pt")).notes
    assert any("assumed gelu, post-norm, distance 128" in note for note in notes)


def test_heads_come_from_the_arguments_where_no_tensor_shows_them(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(relative_attention_num_buckets=0))
    path = tmp_path / "model.pt"
    torch.save({"model": weights_of(model), "args": {"encoder_attention_heads": 4}}, path)
    assert_loads_as(path, model)
    torch.save({"model": weights_of(model)}, path)
    with pytest.raises(CheckpointError, match=r"number of attention heads.*'args'"):
        load_any(str(path))


@pytest.mark.parametrize(("positions", "distance"), [(515, 128), (516, 136), (1024, 256)])
def test_missing_distance_is_annotated_mpnets_default(
    tmp_path: Path, positions: int, distance: int
) -> None:
    model = tiny_model(
        tiny_config(max_positions=positions, relative_attention_max_distance=distance)
    )
    arguments = {**arguments_of(model.config), "relative_attention_max_distance": None}
    torch.save({"args": arguments, "model_states": weights_of(model)}, tmp_path / "model.pt")
    assert_loads_as(tmp_path / "model.pt", model)


def test_padding_id_follows_from_positions_and_rows(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(pad_token_id=0))
    arguments = arguments_of(model.config)
    torch.save({"args": arguments, "model_states": weights_of(model)}, tmp_path / "model.pt")
    assert_loads_as(tmp_path / "model.pt", model)


def test_later_pre_norm_of_annotated_mpnet_is_refused(tmp_path: Path) -> None:
    weights = weights_of(tiny_model())
    weights["sentence_encoder.final_layer_norm.weight"] = torch.ones(16)
    torch.save({"model_states": weights}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="separate final norm"):
        load_any(str(tmp_path / "model.pt"))


@pytest.mark.parametrize("key", ["args", "extra_state", "model"])
def test_file_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, key: str) -> None:
    document = {"model": weights_of(tiny_model()), "args": {}}
    document[key] = LeavesTrace(tmp_path / "canary")  # type: ignore[assignment]
    torch.save(document, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"mkdir.*nothing was run.*torch\.save"):
        load_any(str(tmp_path / "model.pt"))
    assert not (tmp_path / "canary").exists()


def test_allowed_classes_are_allowed_for_this_file_only(tmp_path: Path) -> None:
    torch.save({"model": weights_of(tiny_model())}, tmp_path / "model.pt")
    before = set(torch.serialization.get_safe_globals())
    load_any(str(tmp_path / "model.pt"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": weights_of(tiny_model())}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cannot be read") as refusal:
        load_any(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1, 2], "not a training checkpoint"),
        ({"state": {}}, "not a training checkpoint"),
        ({"model": {}}, "no matrix 'sentence_encoder.embed_tokens.weight'"),
        ({"model": {"encoder.embed_tokens.weight": torch.ones(2, 2)}}, "no matrix"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, document: object, message: str) -> None:
    torch.save(document, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_any(str(tmp_path / "model.pt"))


def test_missing_unexpected_and_untied_tensors_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    weights = weights_of(tiny_model(), "decoder.")
    gap = {**weights}
    del gap["decoder.sentence_encoder.layers.0.fc2.bias"]
    extra = {**weights, "classification_heads.mnli.dense.weight": torch.ones(2)}
    untied = {**weights, "decoder.lm_head.weight": weights["decoder.lm_head.weight"] + 1}
    for changed, message in (
        (gap, r"1 missing \('sentence_encoder\.layers\.0\.fc2\.bias'\)"),
        (extra, r"1 unexpected \('classification_heads"),
        (untied, r"lm_head\.weight differs"),
    ):
        torch.save({"model": changed}, path)
        with pytest.raises(CheckpointError, match=message):
            load_any(str(path))


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_fn": "swish"},
        {"activation_fn": ["gelu"]},
        {"dropout": "much"},
        {"max_positions": MAX_POSITIONS + 100},
        {"relative_attention_max_distance": "far"},
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path: Path, arguments: dict[str, object]) -> None:
    torch.save({"model": weights_of(tiny_model()), "args": arguments}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_any(str(tmp_path / "model.pt"))
