"""`load_model` takes anything that holds an MPNet."""

import logging
from pathlib import Path

import pytest
import torch
from tiny_models import (
    hugging_face_config,
    padded_batch,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from transformers import MPNetModel

from annotated_mpnet import export_to_hugging_face, load_model


def write_model(kind: str, path: Path) -> Path:
    """Save `tiny_model()` in one of the ways, and return where."""
    if kind == "checkpoint":
        return save_tiny_checkpoint(path, 7, "checkpoint7", tiny_model())
    if kind == "run":
        save_tiny_checkpoint(path, 7, "checkpoint7", tiny_model(seed=1))
        save_tiny_checkpoint(path, 5, "best_checkpoint", tiny_model())
    elif kind == "hugging face":
        export_to_hugging_face(tiny_model(), path, tokenizer=tiny_tokenizer(), overwrite=False)
    else:
        path = path.with_suffix(".pt")
        torch.save({"args": {"max_tokens": 40}, "model": tiny_model().state_dict()}, path)
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "run", "hugging face", ".pt"])
def test_every_kind_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    loaded = load_model(write_model(kind, tmp_path / "model"))
    assert not loaded.training
    assert loaded.config.encoder_embed_dim == tiny_config().encoder_embed_dim
    ids_BL, mask_BL = padded_batch(tiny_config().vocab_size, 9)
    with torch.no_grad():
        expected_BLD = tiny_model().eval().encode(ids_BL, mask_BL)
        torch.testing.assert_close(loaded.encode(ids_BL, mask_BL), expected_BLD)


def test_what_is_missing_in_a_file_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MPNetModel(hugging_face_config()).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "annotated_mpnet"):
        load_model(tmp_path)
    assert "head" in caplog.text
