"""What the benchmarks share: shapes, the machine, versions, and the file of a result.

A number without the machine, the versions and the convention that it was measured by cannot be
compared with any other. So every `--json FILE` has the same head:

    benchmark     the script's name
    convention    what the numbers mean, in a sentence
    machine       processor or GPU, cores, threads
    versions      Python, PyTorch, transformers, annotated-mpnet, and the commit, if there is one
    settings      the command line
    results       the raw numbers

Two shapes stand for two kinds of users. `base4` is four of MPNet-base's twelve layers, the largest
part of it that two CPU cores step through while one watches; `demo` is the preset of that name.
`base` is for GPUs.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import ModelConfig, ObjectiveConfig
from annotated_mpnet.mpnet.masking import count_predicted
from annotated_mpnet.training.throughput import device_name


@dataclass(frozen=True)
class Shape:
    """A network and a micro-batch."""

    layers: int
    width: int
    ffn: int
    heads: int
    vocab: int
    batch: int
    length: int


SHAPES = {
    "base4": Shape(4, 768, 3072, 12, 30527, 4, 512),
    "base": Shape(12, 768, 3072, 12, 30527, 64, 512),
    "demo": Shape(3, 128, 512, 4, 8000, 32, 64),
}


def model_config(shape: Shape, dropout: float) -> ModelConfig:
    """Return our network of a shape."""
    return ModelConfig(
        encoder_layers=shape.layers,
        encoder_embed_dim=shape.width,
        encoder_ffn_dim=shape.ffn,
        encoder_attention_heads=shape.heads,
        vocab_size=shape.vocab,
        max_positions=shape.length,
        mask_token_id=shape.vocab - 1,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=0.0,
    )


def hugging_face(shape: Shape, dropout: float) -> nn.Module:
    """Return transformers' network of a shape, with fresh weights."""
    # Here, because it takes seconds to import, and most scripts do without.
    from transformers import MPNetConfig, MPNetForMaskedLM

    return MPNetForMaskedLM(
        MPNetConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            # Position 0 has number pad + 1 there.
            max_position_embeddings=shape.length + 2,
        )
    )


def num_predicted(length: int) -> int:
    """Return P of a full row.

    >>> num_predicted(512), num_predicted(64)
    (76, 9)
    """
    return int(count_predicted(np.array(length - 2), ObjectiveConfig().pred_prob))


def make_batch(shape: Shape, rows: int) -> Batch:
    """Return full rows of random tokens, of which 15 % are predicted, all by a mask."""
    generator = torch.Generator().manual_seed(1)
    L, P = shape.length, num_predicted(shape.length)
    original_BL = torch.randint(5, shape.vocab - 1, (rows, L), generator=generator)
    positions_BP = torch.rand(rows, L - 2, generator=generator).argsort(dim=1)[:, :P] + 1
    ids_BP = original_BL.gather(1, positions_BP)
    masked_BL = original_BL.scatter(1, positions_BP, shape.vocab - 1)
    return Batch(masked_BL, positions_BP, ids_BP, None, rows * L, rows * P)


def machine(device: torch.device) -> str:
    """Return processor or GPU, threads and versions, for the head of a table."""
    name = device_name(device) if device.type == "cuda" else processor()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    found = versions()
    line = (
        f"{name}{threads}, PyTorch {found['torch']}, transformers {found['transformers']}, "
        f"Python {found['python']}"
    )
    return textwrap.fill(line, 100)


def processor() -> str:
    """Return the name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str | None]:
    """Return what was measured, and with what; a commit with changes on top ends in `+`."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "annotated-mpnet"):
        found[package] = None  # not installed
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"commit": commit()}


def commit() -> str | None:
    """Return the commit that this file lies in; None outside of a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_json(
    benchmark: str,
    arguments: argparse.Namespace,
    device: torch.device,
    convention: str,
    results: object,
) -> None:
    """Write a result with its head to the file of `--json`, if one is wanted."""
    if arguments.json is None:
        return
    on_gpu = device.type == "cuda"
    report = {
        "benchmark": benchmark,
        "convention": convention,
        "machine": {
            "device": device_name(device) if on_gpu else processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "versions": versions(),
        "settings": {name: _plain(value) for name, value in vars(arguments).items()},
        "results": results,
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    """Return what JSON can hold of a value of the command line."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
