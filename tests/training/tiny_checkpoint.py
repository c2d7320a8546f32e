"""A checkpoint of a few hundred bytes, for all tests that need one."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from annotated_mpnet.checkpoints.checkpoint import (
    Checkpoint,
    TrainState,
    checkpoint_name,
    save_checkpoint,
)
from annotated_mpnet.checkpoints.manifest import MANIFEST, read_manifest, write_manifest
from annotated_mpnet.mpnet.config import ModelConfig

RUN = "0123456789abcdef" * 2
OTHER_RUN = "fedcba9876543210" * 2

CONFIG = ModelConfig(
    vocab_size=11,
    encoder_layers=1,
    encoder_embed_dim=4,
    encoder_ffn_dim=8,
    encoder_attention_heads=2,
    max_positions=8,
)


def make_checkpoint(update: int, *, run_id: str = RUN, optimizer: bool = True) -> Checkpoint:
    """Return a checkpoint whose tensors are a function of its update."""
    state = TrainState(
        update=update,
        tokens_seen=1000 * update,
        predicted_seen=150 * update,
        best_valid_bits=7.25,
        identity={"data": "abc", "seed": 12345, "masking": 0.15},
    )
    return Checkpoint(
        run_id=run_id,
        state=state,
        model_config=CONFIG,
        model_tensors=make_tensors(update, "embed_tokens.weight", "lm_head.bias"),
        optimizer_tensors=make_tensors(update, "exp_avg.lm_head.bias") if optimizer else None,
    )


def make_tensors(seed: int, *names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 5, generator=generator) for name in names}


def save_tokenizer(directory: Path) -> None:
    (directory / "vocab.txt").write_text("<s>\n<pad>\n</s>\n<unk>\n<mask>\n", encoding="utf-8")


def save(directory: Path, update: int, name: str | None = None, run_id: str = RUN) -> Path:
    """Save the checkpoint of an update under its own name, or another one."""
    checkpoint = make_checkpoint(update, run_id=run_id)
    return save_checkpoint(directory, name or checkpoint_name(update), checkpoint, save_tokenizer)


def seal_again(directory: Path) -> None:
    """Write a correct manifest for a checkpoint that a test has changed."""
    created = read_manifest(directory).created
    (directory / MANIFEST).unlink()
    write_manifest(directory, RUN, created)


def change_json(path: Path, **changes: object) -> None:
    """Overwrite values in a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def same_tensors(left: Checkpoint, right: Checkpoint) -> bool:
    """Return whether two checkpoints have the same bits."""
    plain = dataclasses.replace
    empty: dict[str, Tensor] = {}
    if plain(left, model_tensors=empty, optimizer_tensors=empty) != plain(
        right, model_tensors=empty, optimizer_tensors=empty
    ):
        return False
    assert left.optimizer_tensors is not None
    assert right.optimizer_tensors is not None
    pairs = (
        (left.model_tensors, right.model_tensors),
        (left.optimizer_tensors, right.optimizer_tensors),
    )
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs
    )
