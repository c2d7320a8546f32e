"""A sentence encoder goes in, and the same sentence encoder comes out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Transformer,
)
from tiny_models import converted, hugging_face_config, tiny_tokenizer
from transformers import MPNetModel

from annotated_mpnet.conversion import load_any
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import CheckpointError

SENTENCES = ["The sea, the SEA.", "a", "bing " * 100]
LIMIT = 17


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder of which every part matters to its vectors."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    with quiet_transformers():
        MPNetModel(hugging_face_config()).save_pretrained(folder / "network")
        tiny_tokenizer().save_pretrained(folder / "network")
        transformer = Transformer(str(folder / "network"))
        transformer.tokenizer.model_max_length = LIMIT
        modules = [transformer, Pooling(16, "max"), Dense(16, 5), Normalize()]
        model = SentenceTransformer(
            modules=modules, device="cpu", prompts={"query": "the "}, default_prompt_name="query"
        )
        model.save(str(folder / "sentences"))
    return folder / "sentences"


def opened(directory: Path) -> SentenceTransformer:
    with quiet_transformers():
        return SentenceTransformer(str(directory), device="cpu")


def vectors(directory: Path) -> torch.Tensor:
    return opened(directory).encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)


def test_export_of_a_sentence_encoder_gives_the_same_vectors(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = converted(encoder, tmp_path / "export").directory
    found, wanted = opened(export), opened(encoder)
    assert (vectors(export) - vectors(encoder)).abs().max() < 1e-5
    assert found.max_seq_length == wanted.max_seq_length == LIMIT
    assert (found.prompts, found.default_prompt_name) == (wanted.prompts, "query")
    assert [type(each).__name__ for each in found] == [type(each).__name__ for each in wanted]
    said = capsys.readouterr().out
    assert f"(Transformer, Pooling, Dense, Normalize; texts are cut after {LIMIT} tokens)" in said
    # And once more, over itself: the export is a way in, and can be replaced.
    again = converted(export, tmp_path / "again").directory
    assert (vectors(again) - vectors(encoder)).abs().max() < 1e-5
    converted(encoder, again, overwrite=True)


def test_each_part_of_the_encoder_matters_to_its_vectors(encoder: Path, tmp_path: Path) -> None:
    # What this file tests could otherwise be lost without a test that fails.
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        export = converted(encoder, tmp_path / name).directory
        (export / name).unlink()
        found = vectors(export)
        assert found.shape != (3, 5) or (found - vectors(encoder)).abs().max() > 1e-3


def test_old_layouts_open_in_todays(encoder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(encoder, tmp_path / "old")
    # The network in a folder, the length in the settings of the module, weights as a pickle.
    (old / "0_Transformer").mkdir()
    modules = json.loads((old / "modules.json").read_text())
    for path in [each for each in old.iterdir() if each.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(old / "0_Transformer" / path.name)
    modules[0]["path"] = "0_Transformer"
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (old / "modules.json").write_text(json.dumps(modules))
    settings = {"max_seq_length": LIMIT, "do_lower_case": False}
    (old / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(settings))
    dense = old / "2_Dense" / "model.safetensors"
    torch.save(load_file(dense), dense.with_name("pytorch_model.bin"))
    dense.unlink()
    export = converted(old, tmp_path / "export").directory
    assert (vectors(export) - vectors(encoder)).abs().max() < 1e-5
    assert not list(export.rglob("*.bin"))


def test_module_with_code_of_its_own_is_dropped_with_a_note(encoder: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(encoder, tmp_path / "theirs")
    text = (theirs / "modules.json").read_text()
    modules = json.loads(text)
    modules[2]["type"] = "modeling.Mine"
    (theirs / "modules.json").write_text(json.dumps(modules))
    loaded = load_any(str(theirs))
    assert loaded.modules == {}
    assert "'modeling.Mine' needs code of its own; exports keep none" in loaded.notes[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path / "1_Pooling"), r"1_Pooling/config\.json is missing"),
        (lambda path: (path / "2_Dense/model.safetensors").unlink(), "2_Dense/model.* is missing"),
        (
            lambda path: (path / "2_Dense/model.safetensors").write_bytes(b"<html>not it</html>"),
            "it is a web page",
        ),
        (
            lambda path: (path / "sentence_bert_config.json").write_text('{"max_seq_length": "x"}'),
            "cuts texts after 'x' tokens",
        ),
        (
            lambda path: (path / "modules.json").write_text(
                (path / "modules.json").read_text().replace("1_Pooling", "../1_Pooling")
            ),
            "names the module '../1_Pooling', which is not inside",
        ),
    ],
)
def test_damaged_modules_are_one_line(
    encoder: Path, tmp_path: Path, damage: object, message: str
) -> None:
    damaged = shutil.copytree(encoder, tmp_path / "damaged")
    damage(damaged)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_any(str(damaged))
    assert "\n" not in str(refusal.value)


def test_users_folder_in_an_export_is_not_replaced(encoder: Path, tmp_path: Path) -> None:
    export = converted(encoder, tmp_path / "export").directory
    (export / "2024_results").mkdir()
    with pytest.raises(Exception, match="2024_results"):
        converted(encoder, export, overwrite=True)
