"""What the benchmarks share: shapes, a batch, flags of a run, the machine, files of results.

Two measurements can be compared only if machine, versions and convention are known, so every
`--json FILE` has the same fields:

    benchmark     the script's name
    convention    what the numbers mean, in one sentence
    machine       processor or GPU, cores, threads
    versions      Python, PyTorch, transformers, annotated-mpnet, and the commit if there is one
    settings      the command line
    results       the raw numbers

Shapes: `demo` is the preset of that name, `base` is MPNet-base (for GPUs), and `base4` has four of
its twelve layers (for CPUs).
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
from typing import Any

import numpy as np
import torch
from torch import nn

from annotated_mpnet.errors import ConfigError, DataError
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import ModelConfig, ObjectiveConfig
from annotated_mpnet.mpnet.masking import count_predicted
from annotated_mpnet.settings.parsing import parse_pretrain
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
    """Return the configuration of our network."""
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
    """Return transformers' network, randomly initialised."""
    # Imported here because it takes seconds and most scripts do not need it.
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
            # transformers numbers positions from pad + 1 = 2.
            max_position_embeddings=shape.length + 2,
        )
    )


def num_predicted(length: int) -> int:
    """Return P, the number of predicted tokens, of a full sequence.

    >>> num_predicted(512), num_predicted(64)
    (76, 9)
    """
    return int(count_predicted(np.array(length - 2), ObjectiveConfig().pred_prob))


def make_batch(shape: Shape, sequences: int) -> Batch:
    """Return full sequences of random tokens; 15 % are predicted, and all of those are masked."""
    generator = torch.Generator().manual_seed(1)
    L, P = shape.length, num_predicted(shape.length)
    original_BL = torch.randint(5, shape.vocab - 1, (sequences, L), generator=generator)
    positions_BP = torch.rand(sequences, L - 2, generator=generator).argsort(dim=1)[:, :P] + 1
    ids_BP = original_BL.gather(1, positions_BP)
    masked_BL = original_BL.scatter(1, positions_BP, shape.vocab - 1)
    return Batch(masked_BL, positions_BP, ids_BP, None, sequences * L, sequences * P)


def parse_with_run_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; what follows `--` is for pretrain-mpnet, and goes to `flags`."""
    given = sys.argv[1:]
    own = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:own])
    arguments.flags = given[own + 1 :]
    try:
        parse_pretrain(["--preset", arguments.preset, *arguments.flags])
    except ConfigError as error:
        parser.error(str(error))
    return arguments


def machine(device: torch.device) -> str:
    """Describe the processor or GPU, threads and versions, for the top of a table."""
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
    """Return the versions; the commit ends in `+` if there are uncommitted changes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "annotated-mpnet"):
        found[package] = None  # not installed
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"commit": commit()}


def commit() -> str | None:
    """Return the commit of this file; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


Found = dict[str, Any]


class Results:
    """Measurements as lines of JSON, written one by one; a restart reads them."""

    def __init__(self, path: Path | None) -> None:
        """Read the file, or make it; without a path, the lines are in memory only."""
        self.path, self.lines = path, list[Found]()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_text(encoding="utf-8") if path.exists() else ""
        # A line without an end was being written when the script was killed.
        whole = whole[: whole.rfind("\n") + 1]
        for number, each in enumerate(whole.splitlines(), 1):
            try:
                self.lines.append(json.loads(each))
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON; remove it") from error
        path.write_text(whole, encoding="utf-8")

    def find(self, kind: str, **key: object) -> Found | None:
        """Return the measurement of a kind with these values."""
        wanted = {"kind": kind, **key}
        for each in self.lines:
            if all(each.get(name) == value for name, value in wanted.items()):
                return each
        return None

    def begin_anew(self) -> None:
        """Forget everything."""
        self.lines.clear()
        if self.path is not None:
            self.path.write_text("", encoding="utf-8")

    def add(self, kind: str, **values: object) -> Found:
        """Write a measurement, and return it."""
        self.lines.append({"kind": kind, **values})
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        return self.lines[-1]


def write_json(
    benchmark: str,
    arguments: argparse.Namespace,
    device: torch.device,
    convention: str,
    results: object,
) -> None:
    """Write the results and what they depend on to the file of `--json`, if given."""
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
    """Make a command line value fit for JSON."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
