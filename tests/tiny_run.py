"""A run small enough to repeat often: real text, a tiny network, at most a second."""

import dataclasses
import io
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pytest
import torch
from rich.console import Console

from annotated_mpnet.mpnet.config import ArchitectureConfig, OptimizationConfig
from annotated_mpnet.runs.run import RunResult, run_pretraining
from annotated_mpnet.settings.config import (
    DataConfig,
    MachineConfig,
    PretrainingConfig,
    RunConfig,
    TrackingConfig,
)
from annotated_mpnet.text.learn_tokenizer import train_tokenizer
from annotated_mpnet.tracking import report


@dataclasses.dataclass(frozen=True)
class TinyText:
    """Paths of a few pages of a novel, and of a tokenizer trained on them."""

    train_dir: Path
    valid_file: Path
    test_file: Path
    tokenizer: Path


def write_text(directory: Path) -> TinyText:
    """Write text and tokenizer below a directory."""
    packed = resources.files("annotated_mpnet.demo") / "austen" / "persuasion.txt.xz"
    lines = lzma.decompress(packed.read_bytes()).decode().splitlines(keepends=True)
    text = TinyText(
        directory / "train",
        directory / "valid.txt",
        directory / "test.txt",
        directory / "tokenizer",
    )
    text.train_dir.mkdir(parents=True)
    (text.train_dir / "a.txt").write_text("".join(lines[:60]))
    (text.train_dir / "b.txt").write_text("".join(lines[60:100]))
    text.valid_file.write_text("".join(lines[100:115]))
    text.test_file.write_text("".join(lines[115:130]))
    files = sorted(text.train_dir.iterdir())
    train_tokenizer(files, vocab_size=400).save_pretrained(text.tokenizer)
    return text


def write_dataset(text: TinyText, folder: Path, shards: int) -> Path:
    """Write the training documents as shards of JSON lines, like a dataset of the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(text.train_dir.iterdir())
    documents = [line for file in files for line in file.read_text().splitlines()]
    for shard in range(shards):
        lines = [json.dumps({"text": each}) + "\n" for each in documents[shard::shards]]
        (folder / f"train-{shard:05}.jsonl").write_text("".join(lines))
    return folder


def tiny_config(text: TinyText, directory: Path) -> PretrainingConfig:
    """Two layers, 16 wide, sequences of 32 tokens, with dropout and accumulation.

    On a CPU even if there is a GPU, so the tests are the same on any machine.
    """
    return PretrainingConfig(
        model=ArchitectureConfig(
            encoder_layers=2, encoder_embed_dim=16, encoder_ffn_dim=32, encoder_attention_heads=2
        ),
        data=DataConfig(
            train_dir=text.train_dir,
            valid_file=text.valid_file,
            test_file=text.test_file,
            tokenizer_name=str(text.tokenizer),
            max_tokens=32,
        ),
        optimization=OptimizationConfig(
            batch_size=4,
            update_freq=2,
            total_updates=8,
            warmup_updates=2,
            lr=1e-3,
            # Starting from frequencies, eight updates would change too little.
            head_bias="zeros",
        ),
        machine=MachineConfig(device="cpu"),
        run=RunConfig(checkpoint_dir=directory, eval_interval_steps=4),
        tracking=TrackingConfig(logging_steps=2),
    )


def changed(config: PretrainingConfig, **changes: object) -> PretrainingConfig:
    """Return the configuration with changed fields, which may be in any group."""
    groups = {}
    for group in dataclasses.fields(config):
        values = getattr(config, group.name)
        own = {name: value for name, value in changes.items() if hasattr(values, name)}
        groups[group.name] = dataclasses.replace(values, **own)
        changes = {name: value for name, value in changes.items() if name not in own}
    assert not changes, f"no such setting: {sorted(changes)}"
    return dataclasses.replace(config, **groups)


def run(config: PretrainingConfig) -> tuple[RunResult, str]:
    """Run; return the result and the console output."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # To draw it takes a third of a run's time; test_report.py looks at it.
        patch.setattr(report, "_draw", lambda folder, *_: (folder / report.PICTURE).touch())
        result = run_pretraining(config, Console(file=said, width=120))
    assert result is not None
    return result, said.getvalue()


@contextmanager
def bare_runs() -> Iterator[None]:
    """Speed up the runs in a `with` block.

    Their report is one word, and they use one thread, because two would mostly wait for each other
    in such a small network.
    """

    def write_report(directory: Path, *_: object) -> list[Path]:
        (directory / report.REPORT).write_text("short")
        return []

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("annotated_mpnet.runs.run.write_report", write_report)
        yield
    torch.set_num_threads(threads)
