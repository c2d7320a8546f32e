"""Files of others are read whole, or refused in one line. None is run."""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_models import (
    VOCAB_SIZE,
    LeavesTrace,
    converted,
    save_tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)

from annotated_mpnet.checkpoints.manifest import write_manifest
from annotated_mpnet.conversion import export_to_hugging_face, load_any
from annotated_mpnet.errors import CheckpointError, ConfigError, WriteError


def refused(path: Path | str, match: str) -> None:
    """Check that a path is refused in one line that matches; a warning would be an error."""
    with pytest.raises(CheckpointError, match=match) as refusal:
        load_any(str(path))
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "hf"
    export_to_hugging_face(tiny_model(), directory, tokenizer=tiny_tokenizer(), pytorch_bin=True)
    return directory


@pytest.fixture
def hf(export: Path, tmp_path: Path) -> Path:
    """An export that a test may change; without its pickle."""
    shutil.copytree(export, tmp_path / "hf")
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    return tmp_path / "hf"


def bytes_of(write: Callable[[BytesIO], object]) -> bytes:
    buffer = BytesIO()
    write(buffer)
    return buffer.getvalue()


def zip_of_text(buffer: BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.txt", "hello")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"\x80", "a pickle"),
        (b"short", "5 bytes long"),
        (b"Once upon a time there was a ship.", "it is text"),
        (b'{"error": "Repository not found"}', "it is text"),
        (b"<!DOCTYPE html><html>Not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (pickle.dumps({"model": {"a": np.ones(3)}}), "a pickle, but not of torch.save"),
        (pickle.dumps({"model": 1}, protocol=0), "a pickle, but not of torch.save"),
        (pickle.dumps(np.ones(300)), "a pickle, but not of torch.save"),
        (bytes_of(lambda buffer: np.save(buffer, np.ones(3))), "a NumPy array"),
        (bytes_of(lambda buffer: np.savez(buffer, a=np.ones(3))), "a zip archive"),
        (bytes_of(zip_of_text), "a zip archive"),
        (b"\x1f\x8b" + bytes(50), "compressed"),
        (b"x\x9c" + bytes(50), "compressed"),
        (bytes(1000), "of an unknown format"),
    ],
)
def test_file_of_another_kind_is_called_what_it_is(
    hf: Path, tmp_path: Path, data: bytes, said: str
) -> None:
    (tmp_path / "model.pt").write_bytes(data)
    refused(
        tmp_path / "model.pt", f"model.pt cannot be read: it is .*{said.removeprefix('it is ')}"
    )
    (hf / "model.safetensors").write_bytes(data)
    refused(hf, f"model.safetensors cannot be read.*{said}.*expected a safetensors file")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    refused(hf, f"pytorch_model.bin cannot be read.*{said}.*expected a PyTorch file")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_plain_pickle_is_not_even_opened(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(LeavesTrace(tmp_path / "canary"), protocol)
    (tmp_path / "model.pt").write_bytes(data)
    refused(tmp_path / "model.pt", "a pickle")
    assert not (tmp_path / "canary").exists()


def test_torchscript_is_refused_without_pytorchs_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "TorchScript")


def test_safetensors_given_as_a_file_names_the_way_out(hf: Path) -> None:
    refused(hf / "model.safetensors", "is a safetensors file.*give the directory")


def test_file_of_an_old_pytorch_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = {"model": tiny_model().state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert load_any(str(path)).config.vocab_size == VOCAB_SIZE


def test_tensor_whose_numbers_are_not_in_the_file_is_refused(
    tmp_path: Path,
) -> None:
    path, state = tmp_path / "model.pt", tiny_model().state_dict()
    table = "sentence_encoder.embed_tokens.weight"
    for strange in (torch.zeros(1).expand(10**12, 16), torch.zeros(VOCAB_SIZE, 16, device="meta")):
        torch.save({"model": {**state, table: strange}}, path)
        refused(path, "numbers are not in the file|has shape")


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_tensor_of_another_type_is_refused_by_name(tmp_path: Path, kind: torch.dtype) -> None:
    state = tiny_model().state_dict()
    torch.save(
        {"model": {**state, "lm_head.bias": torch.ones(VOCAB_SIZE, dtype=kind)}}, tmp_path / "a.pt"
    )
    refused(tmp_path / "a.pt", f"lm_head.bias.*found {kind}")


def test_bfloat16_becomes_float32_and_what_is_too_large_for_float32_is_refused(
    tmp_path: Path,
) -> None:
    state = tiny_model().bfloat16().state_dict()
    torch.save({"model": state}, tmp_path / "a.pt")
    found = load_any(str(tmp_path / "a.pt")).tensors["lm_head.bias"]
    assert torch.equal(found, state["lm_head.bias"].float())
    large = torch.full((VOCAB_SIZE,), 1e300, dtype=torch.float64)
    torch.save({"model": {**state, "lm_head.bias": large}}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "lm_head.bias holds values that are not finite")


def test_tensor_with_two_prefixes_is_refused(tmp_path: Path) -> None:
    state = tiny_model().state_dict()
    both = {**state, "decoder.lm_head.bias": state["lm_head.bias"] + 1}
    torch.save({"model": both}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", r"'lm_head\.bias' twice")


def test_sparse_terabyte_is_compared_with_its_configuration_and_not_read(hf: Path) -> None:
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    name, rows = "mpnet.embeddings.word_embeddings.weight", 2**34
    del tensors[name]
    whole = safetensors.torch.save(tensors)
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header[name] = {
        "dtype": "F32",
        "shape": [rows, 16],
        "data_offsets": [len(data), len(data) + rows * 64],
    }
    text = json.dumps(header).encode()
    with (hf / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        file.truncate(8 + len(text) + len(data) + rows * 64)
    # Some systems do not map a file that is larger than their memory.
    shapes = rf"word_embeddings\.weight has shape \({rows}, 16\), expected \({VOCAB_SIZE}, 16\)"
    refused(hf, f"{shapes}|does not fit into memory")


def test_file_that_does_not_fit_into_memory_is_one_line(
    hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(path: Path, device: str) -> None:
        raise MemoryError

    monkeypatch.setattr(safetensors.torch, "load_file", no_memory)
    refused(hf, r"model\.safetensors cannot be read: MemoryError.*does not fit into memory")


EDITS: list[tuple[str, str, Any, str]] = [
    # ours, Hugging Face's, value, what is said
    ("encoder_layers", "num_hidden_layers", 3, "missing .*ayers?.2."),
    ("encoder_layers", "num_hidden_layers", 1, "unexpected .*ayers?.1."),
    ("encoder_layers", "num_hidden_layers", -1, "layers"),
    ("encoder_embed_dim", "hidden_size", 32, r"has shape .*16.*expected .*32"),
    ("encoder_embed_dim", "hidden_size", "16", "(embed_dim|hidden_size)"),
    ("encoder_ffn_dim", "intermediate_size", 64, r"has shape \(32,.*expected \(64,"),
    ("encoder_attention_heads", "num_attention_heads", 2, r"bias.* \(32, 4\), expected \(32, 2\)"),
    ("encoder_attention_heads", "num_attention_heads", 5, "attention.heads 5"),
    ("vocab_size", "vocab_size", 10**12, rf"\({VOCAB_SIZE},.*expected \(1000000000000,"),
    ("vocab_size", "vocab_size", 10**400, "cannot be read"),
    ("max_positions", "max_position_embeddings", 10**6, r"\(42, 16\), expected \(100000"),
    ("relative_attention_num_buckets", "relative_attention_num_buckets", 64, "64"),
    ("pad_token_id", "pad_token_id", 3, "pad_token_id is 3|expected .44, 16"),
    ("pad_token_id", "pad_token_id", 10**12, "pad_token_id is 1000000000000"),
    ("dropout", "hidden_dropout_prob", 1.5, "dropout(_prob)? is 1.5"),
    ("dropout", "hidden_dropout_prob", True, "dropout"),
    ("activation_fn", "hidden_act", "sigmoid", "'sigmoid'.*(activation_fn|relu2)"),
]


@pytest.mark.parametrize("kind", ["ours", "whole", "shards"])
@pytest.mark.parametrize(("ours", "theirs", "value", "said"), EDITS)
def test_configuration_that_does_not_fit_its_weights_is_refused_by_name(
    hf: Path, tmp_path: Path, kind: str, ours: str, theirs: str, value: Any, said: str
) -> None:
    if kind == "shards":
        shard(hf)
    if kind == "ours":
        directory = save_tiny_checkpoint(tmp_path / "run", 7, "checkpoint7", tiny_model())
    else:
        directory = hf
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values[ours if kind == "ours" else theirs] = value
    path.write_text(json.dumps(values))
    if kind == "ours":
        (directory / "manifest.json").unlink()
        write_manifest(directory, "a run", "now")
    refused(directory, said)


# Weights in shards.


def shard(directory: Path, name: str = "model.safetensors") -> dict[str, str]:
    """Spread a model over two files, as transformers does, and return the index."""
    whole = directory / name
    tensors = load_weights(whole)
    whole.unlink()
    index = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"{whole.stem}-0000{number}-of-00002{whole.suffix}"
        save_weights({each: tensors[each].clone() for each in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".bin":
        return dict(torch.load(path, weights_only=True))
    return safetensors.torch.load_file(path)


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_model_in_shards_is_the_same_model(export: Path, tmp_path: Path, name: str) -> None:
    for file in ("config.json", name):
        shutil.copy(export / file, tmp_path)
    shard(tmp_path, name)
    wanted = load_any(str(export)).tensors
    found = load_any(str(tmp_path)).tensors
    assert all(torch.equal(found[each], wanted[each]) for each in wanted)


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "{absolute}", "none.safetensors", ".."]
)
def test_shard_that_is_not_a_file_in_the_directory_is_refused(hf: Path, where: str) -> None:
    outside = hf.parent / "outside.safetensors"
    index = shard(hf)
    first = min(index.values())
    shutil.copy(hf / first, outside)
    changed = where.format(absolute=outside)
    index = {name: changed if file == first else file for name, file in index.items()}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(hf, "which is not a file in its directory")


def test_shards_that_hold_the_same_tensor_or_lack_one_are_refused(hf: Path) -> None:
    first, second = sorted(set(shard(hf).values()))
    tensors = load_weights(hf / second)
    save_weights({**tensors, "lm_head.bias": torch.ones(VOCAB_SIZE)}, hf / second)
    refused(hf, r"holds 'lm_head\.bias', which another shard")
    tensors.popitem()
    save_weights(tensors, hf / second)
    refused(hf, "1 missing")
    (hf / first).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(hf, f"{first} cannot be read: it is a Git LFS pointer")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_broken_index_is_one_line(hf: Path, text: str) -> None:
    shard(hf)
    (hf / "model.safetensors.index.json").write_text(text)
    refused(hf, r"model\.safetensors\.index\.json cannot be read")


def test_path_that_cannot_be_looked_at_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("x" * 300, "File name too long")
    refused("a\0b", "null byte|does not exist")
    with pytest.raises(WriteError, match="File name too long"):
        export_to_hugging_face(tiny_model(), tmp_path / ("x" * 300), tokenizer=None)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", forbidden)
    refused(tmp_path / "private" / "model", "Permission denied")


# Where an export may go


@pytest.mark.parametrize("target", ["", "..", "checkpoint7/hf", "link", "link/tokenizer/hf"])
def test_target_never_replaces_its_source_or_changes_a_checkpoint(
    tmp_path: Path, target: str
) -> None:
    run = tmp_path / "run"
    checkpoint = save_tiny_checkpoint(run, 7, "checkpoint7", tiny_model())
    (run / "link").symlink_to(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"another directory|directory outside|is a link"):
        converted(run, run / target, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    converted(run, run / "hf")


def test_hugging_face_model_is_not_converted_onto_itself(hf: Path) -> None:
    (hf.parent / "link").symlink_to(hf)
    before = (hf / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"is or holds .*, which is read"):
        converted(hf, hf.parent / "link", overwrite=True)
    assert (hf / "model.safetensors").read_bytes() == before
