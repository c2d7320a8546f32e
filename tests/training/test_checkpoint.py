"""Round trip, determinism, and every kind of damage."""

import json
import os
import pickle
import random
import struct
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoint import (
    change_json,
    make_checkpoint,
    same_tensors,
    save,
    save_tokenizer,
    seal_again,
)

from annotated_mpnet.checkpoints import manifest as manifest_module
from annotated_mpnet.checkpoints.checkpoint import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    STATE,
    load_checkpoint,
    save_checkpoint,
)
from annotated_mpnet.checkpoints.manifest import MANIFEST, read_manifest, seal, verify_checkpoint
from annotated_mpnet.errors import CheckpointError
from folders import tree

FILES = [MODEL, OPTIMIZER, STATE, CONFIG, "tokenizer/vocab.txt", MANIFEST]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path, 20)


def rewrite_manifest(path: Path, **changes: object) -> None:
    """Change a manifest's content and its checksum with it, as an attacker would."""
    content = json.loads((path / MANIFEST).read_text())["content"]
    (path / MANIFEST).write_bytes(seal({**content, **changes}))


def test_loading_returns_what_was_saved_to_the_bit(saved: Path) -> None:
    assert same_tensors(load_checkpoint(saved), make_checkpoint(20))


def test_checkpoint_has_the_documented_files_and_no_others(saved: Path) -> None:
    assert set(tree(saved)) == set(FILES)
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint20"]


def test_the_same_state_gives_the_same_bytes_in_any_run_and_order(tmp_path: Path) -> None:
    first = make_checkpoint(20)
    backwards = dict(reversed(first.model_tensors.items()))
    second = make_checkpoint(20, run_id="f" * 32)
    object.__setattr__(second, "model_tensors", backwards)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    left = tree(save_checkpoint(tmp_path / "a", "checkpoint20", first, save_tokenizer))
    right = tree(save_checkpoint(tmp_path / "b", "checkpoint20", second, save_tokenizer))
    # Only the manifest depends on run and time.
    assert left.pop(MANIFEST) != right.pop(MANIFEST)
    assert left == right


def test_manifest_says_which_run_and_libraries_wrote_it(saved: Path) -> None:
    manifest = verify_checkpoint(saved)
    assert manifest.run_id == "0123456789abcdef" * 2
    assert manifest.libraries["torch"] == torch.__version__
    assert manifest.files[MODEL].size == (saved / MODEL).stat().st_size


@pytest.mark.parametrize("name", FILES)
def test_truncation_is_found_and_the_file_named(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    for length in (0, 1, 8, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        (saved / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=Path(name).name):
            verify_checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
def test_every_one_of_200_bit_flips_is_found(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    generator = random.Random(7)
    for _ in range(200):
        position, bit = generator.randrange(len(whole)), generator.randrange(8)
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        (saved / name).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify_checkpoint(saved)


def test_plain_formats_let_nine_in_ten_bit_flips_pass(tmp_path: Path) -> None:
    # This number is in the docstring of the manifest; it is why there is one.
    tensors = {"weight": torch.zeros(5000)}
    save_file(tensors, tmp_path / "plain.safetensors")
    torch.save(tensors, tmp_path / "plain.pt")
    loaders = {"plain.safetensors": load_file, "plain.pt": torch.load}
    for name, load in loaders.items():
        whole = (tmp_path / name).read_bytes()
        generator = random.Random(7)
        passed = 0
        for _ in range(200):
            damaged = bytearray(whole)
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            # Any exception at all counts as found.
            with suppress(Exception):
                passed += len(load(tmp_path / name)) == 1
        assert passed >= 180, name


def test_a_bit_flip_in_any_byte_of_the_manifest_is_found(saved: Path) -> None:
    # Only the manifest's own checksum covers it, so every byte is tested, not a sample. A step of 7
    # bits visits each of the eight bits equally often.
    whole = (saved / MANIFEST).read_bytes()
    for position in range(0, 8 * len(whole), 7):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        (saved / MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_manifest(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_zeroed_block_is_found(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[:4] + bytes(min(512, len(whole) - 4)) + whole[516:])
    with pytest.raises(CheckpointError):
        verify_checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_replaced_file_is_found_and_named(saved: Path, name: str) -> None:
    path = saved / name
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        verify_checkpoint(saved)
    path.mkdir()
    with pytest.raises(CheckpointError, match=path.name):
        verify_checkpoint(saved)
    path.rmdir()
    # Opening a FIFO would block until something writes to it.
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=path.name):
        verify_checkpoint(saved)


def test_extra_files_are_ignored(saved: Path) -> None:
    (saved / "notes.txt").write_text("a good one")
    assert same_tensors(load_checkpoint(saved), make_checkpoint(20))


@pytest.mark.parametrize("name", FILES[:3])
def test_files_swapped_between_two_checkpoints_are_found(tmp_path: Path, name: str) -> None:
    first, second = save(tmp_path, 10), save(tmp_path, 20)
    (first / name).write_bytes((second / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"SHA-256|bytes"):
        load_checkpoint(first)


def test_a_renamed_checkpoint_is_found_by_its_update(saved: Path) -> None:
    saved.rename(saved.with_name("checkpoint99"))
    with pytest.raises(CheckpointError, match="says update 20, expected 99"):
        load_checkpoint(saved.with_name("checkpoint99"))


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "torch_zip"])
def test_a_path_that_is_not_a_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint5"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"weights")
    elif kind == "torch_zip":
        torch.save({"model": torch.zeros(3)}, path)
    wanted = {"missing": "does not exist", "empty": "has no manifest.json"}.get(kind, "is a file")
    with pytest.raises(CheckpointError, match=f"checkpoint5 {wanted}"):
        load_checkpoint(path)


BAD_STATES: list[dict[str, object]] = [
    {"update": "20"},
    {"update": 20.0},
    {"update": 1e9},
    {"update": 10**9},
    {"update": 10**30},
    {"update": -1},
    {"update": True},
    {"update": None},
    {"update": float("nan")},
    {"tokens_seen": float("inf")},
    {"predicted_seen": [1]},
    {"best_valid_bits": float("nan")},
    {"best_valid_bits": "7"},
    {"identity": []},
    {"identity": {"seed": None}},
    {"identity": {"seed": float("-inf")}},
    {"surprise": 1},
]


@pytest.mark.parametrize("changes", BAD_STATES, ids=repr)
def test_an_impossible_state_is_refused_even_with_right_hashes(
    saved: Path, changes: dict[str, object]
) -> None:
    change_json(saved / STATE, **changes)
    seal_again(saved)
    with pytest.raises(CheckpointError, match=STATE):
        load_checkpoint(saved)


BAD_JSON = [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b'{"update": 1e999}', b"[" * 100_000]
BAD_JSON += [b'{"update": ' + b"9" * 5000 + b"}", b"{}", b'"\\ud800"']


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("name", [STATE, CONFIG])
def test_invalid_json_is_refused_even_with_right_hashes(
    saved: Path, name: str, content: bytes
) -> None:
    (saved / name).write_bytes(content)
    seal_again(saved)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(saved)


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: repr(content[:12]))
def test_a_manifest_that_is_not_json_is_refused(saved: Path, content: bytes) -> None:
    (saved / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        load_checkpoint(saved)


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode()))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_as_manifest_raise_nothing_but_checkpoint_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError):
            read_manifest(Path(directory))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
RIGHT: dict[str, object] = {
    "format_version": 1,
    "run_id": "0" * 32,
    "created": "",
    "libraries": {"torch": "2"},
    "files": {"state.json": {"size": 3, "sha256": "0" * 64}},
}


@given(st.sampled_from([*RIGHT, "files/state.json", "surprise"]), JSON_VALUES)
@settings(max_examples=200, deadline=None)
def test_any_types_in_a_manifest_raise_nothing_but_checkpoint_error(
    field: str, value: object
) -> None:
    content = json.loads(json.dumps(RIGHT))
    if field == "files/state.json":
        content["files"]["state.json"] = value
    else:
        content[field] = value
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / MANIFEST).write_bytes(seal(content))
        # With a correct checksum, legal values are accepted and all others raise our error.
        with suppress(CheckpointError):
            manifest = read_manifest(Path(directory))
            assert field != "surprise"
            assert isinstance(manifest.run_id, str)
            assert all(record.size >= 0 for record in manifest.files.values())


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "..", "", ".", "a\\b", "a//b", "c:d"]
)
def test_file_names_that_lead_out_of_the_checkpoint_are_refused(saved: Path, name: str) -> None:
    files = json.loads((saved / MANIFEST).read_text())["content"]["files"]
    rewrite_manifest(saved, files={**files, name: files[MODEL]})
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        verify_checkpoint(saved)


def test_a_newer_format_is_refused_with_both_versions(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite_manifest(saved, format_version=2, files="laid out in another way")
    with pytest.raises(CheckpointError, match=r"format version 2; .* up to version 1"):
        load_checkpoint(saved)
    monkeypatch.setattr(manifest_module, "FORMAT_VERSION", 2)
    with pytest.raises(
        CheckpointError, match=r"Expected `object`, got `str` - at `\$\.content\.files`"
    ):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": "1"}, r"Expected `int`, got `str` - at `\$\.encoder_layers`"),
        ({"encoder_layers": 0}, "encoder-layers is 0"),
        ({"dropout": float("nan")}, "JSON is malformed"),
        ({"activation_fn": "softmax"}, "activation_fn"),
        ({"normalize_before": 1}, r"Expected `bool`, got `int` - at `\$\.normalize_before`"),
        ({"hidden_size": 768}, "hidden_size"),
    ],
)
def test_an_impossible_model_configuration_is_refused(
    saved: Path, changes: dict[str, object], message: str
) -> None:
    change_json(saved / CONFIG, **changes)
    seal_again(saved)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


class Canary:
    """A pickle that creates a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, CONFIG])
@pytest.mark.parametrize("kind", ["pickle", "torch_zip"])
def test_a_pickle_is_never_run_even_with_right_hashes(saved: Path, name: str, kind: str) -> None:
    canary = saved.parent / "canary"
    with (saved / name).open("wb") as file:
        (pickle.dump if kind == "pickle" else torch.save)(Canary(canary), file)
    seal_again(saved)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(saved)
    assert not canary.exists()


@pytest.mark.parametrize("name", [MODEL, MANIFEST])
def test_a_header_that_claims_an_exabyte_allocates_nothing(saved: Path, name: str) -> None:
    with (saved / name).open("wb") as file:
        file.write(struct.pack("<Q", 2**60) + b"{}")
        # Sparse: a terabyte by its size, a few bytes on the disk.
        file.truncate(2**40)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(saved)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_header_bomb_with_right_hashes_is_refused(saved: Path) -> None:
    (saved / MODEL).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    seal_again(saved)
    with pytest.raises(CheckpointError, match=MODEL):
        load_checkpoint(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    checkpoint = make_checkpoint(20)
    checkpoint.model_tensors["lm_head.bias"][1, 2] = value
    path = save_checkpoint(tmp_path, "checkpoint20", checkpoint, save_tokenizer)
    with pytest.raises(CheckpointError, match=r"lm_head\.bias"):
        load_checkpoint(path)


def test_adam_never_starts_without_its_state(tmp_path: Path) -> None:
    deleted = save(tmp_path, 10)
    (deleted / OPTIMIZER).unlink()
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        load_checkpoint(deleted)
    never_saved = save_checkpoint(
        tmp_path, "checkpoint20", make_checkpoint(20, optimizer=False), save_tokenizer
    )
    with pytest.raises(CheckpointError, match="--no-save-optimizer-state"):
        load_checkpoint(never_saved)
    emptied = make_checkpoint(30)
    object.__setattr__(emptied, "optimizer_tensors", {})
    with pytest.raises(CheckpointError, match="empty after update 30"):
        load_checkpoint(save_checkpoint(tmp_path, "checkpoint30", emptied, save_tokenizer))


def test_export_needs_no_optimizer(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(20, optimizer=False)
    path = save_checkpoint(tmp_path, "checkpoint20", checkpoint, save_tokenizer)
    loaded = load_checkpoint(path, to_resume=False)
    assert loaded.optimizer_tensors is None
    assert loaded.model_tensors.keys() == checkpoint.model_tensors.keys()
    assert len(tree(path)) == len(FILES) - 1


def test_damage_is_reported_in_one_escaped_line(saved: Path) -> None:
    change_json(saved / STATE, update="\x1b[31m\n" + "x" * 1000)
    seal_again(saved)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(saved)
    message = str(caught.value).replace(str(saved), "")
    assert "\x1b" not in message
    assert "\n" not in message
    assert len(message) < 200
