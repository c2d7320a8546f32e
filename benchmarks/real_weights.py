"""A real network from Hugging Face: does it load, compute the same, and continue to learn?

    python benchmarks/real_weights.py DIR [--updates 100] [--lr 5e-5] [--batch-size 4]
                                          [--head-bias frequencies] [--json FILE]

DIR holds an MPNet with its tokenizer, for example a download of all-mpnet-base-v2. Two checks that
the tests do with tiny networks only:

1. Does `encode` compute the same as Hugging Face? For 32 sentences of different lengths, padded
   into one batch, it prints the largest difference in a hidden state.
2. Does continued pretraining on the demo's novels work? It prints the loss in bits per predicted
   token on a twentieth of Northanger Abbey, and that of guessing by frequency. An encoder without a
   head gets a new one.

About 10 minutes on 2 CPU cores, and 4 GB of memory.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import MPNetModel

from annotated_mpnet.conversion import load_any
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.demo.corpus import unpack
from annotated_mpnet.mpnet.config import ArchitectureConfig, OptimizationConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.run import run_pretraining
from annotated_mpnet.settings.config import DataConfig, PretrainingConfig, RunConfig, TrackingConfig
from annotated_mpnet.text.tokenizer import load_tokenizer

SENTENCES = 32
HELD_OUT = 20
"""Validate on every 20th document of the novel: 48 sequences of 128, enough for 0.1 bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "directory", type=Path, help="an MPNet from Hugging Face, with its tokenizer"
    )
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per update")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--head-bias", choices=["zeros", "frequencies"], default="frequencies")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        unpack(text)
        lines = (text / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        (text / "valid.txt").write_text("".join(lines[::HELD_OUT]), encoding="utf-8")
        sentences = [line.strip() for line in lines[1::HELD_OUT] if len(line) > 20][:SENTENCES]
        report = {"encode": compare_encoders(arguments.directory, sentences)}
        print(f"encode: differs from Hugging Face's MPNetModel by at most {report['encode']:.1e}")

        config = configuration(arguments, text, Path(folder))
        # One update that changes nothing shows the initial loss.
        frozen = {"lr": 1e-12, "end_learning_rate": 0.0, "total_updates": 1, "warmup_updates": 0}
        optimization = replace(config.optimization, **frozen)
        report |= curve(replace(config, optimization=optimization), "begin")
        report |= curve(config, "train")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def compare_encoders(directory: Path, sentences: list[str]) -> float:
    """Return the largest difference in a hidden state, without padding, in float32."""
    loaded = load_any(str(directory))
    ours = MPNetForPretraining(loaded.config)
    ours.load_state_dict(loaded.tensors)
    with quiet_transformers():
        theirs = MPNetModel.from_pretrained(directory, dtype=torch.float32)
    batch = load_tokenizer(str(directory))(
        sentences, padding=True, truncation=True, max_length=512, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = ours.eval().encode(batch["input_ids"], batch["attention_mask"])
        wanted = theirs.eval()(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(dim=1)
    print(f"{len(sentences)} sentences of {lengths.min()} to {lengths.max()} tokens")
    return float((hidden - wanted).abs()[batch["attention_mask"] == 1].max())


def configuration(arguments: argparse.Namespace, text: Path, folder: Path) -> PretrainingConfig:
    """Return the run's settings: five updates of warm-up, then a constant learning rate."""
    return PretrainingConfig(
        model=ArchitectureConfig(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
        data=DataConfig(
            train_dir=text / "train",
            valid_file=text / "valid.txt",
            tokenizer_name=str(arguments.directory),
            max_tokens=arguments.tokens,
        ),
        optimization=OptimizationConfig(
            batch_size=arguments.batch_size,
            update_freq=1,
            total_updates=arguments.updates,
            lr=arguments.lr,
            end_learning_rate=arguments.lr,
            warmup_updates=5,
            head_bias=arguments.head_bias,
        ),
        run=RunConfig(
            checkpoint_dir=folder / "run",
            hf_model_path=str(arguments.directory),
            eval_interval_steps=10,
            save_optimizer_state=False,
            export_hf=False,
            overwrite=True,
        ),
        tracking=TrackingConfig(logging_steps=10),
    )


def curve(config: PretrainingConfig, name: str) -> dict[str, object]:
    """Pretrain; return validation bits and accuracy at each evaluation."""
    started = time.perf_counter()
    result = run_pretraining(config, Console())
    lines = (result.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [point for point in map(json.loads, lines) if "valid/bits" in point]
    assert result.plateau is not None
    print(f"{name}: plateau {result.plateau.bits:.2f} bits, accuracy {result.plateau.accuracy:.3f}")
    for point in points:
        bits, accuracy = point["valid/bits"], point["valid/accuracy"]
        print(f"{name}: after {point['step']:>4} updates {bits:6.2f} bits, accuracy {accuracy:.3f}")
    print(f"{name}: {time.perf_counter() - started:.0f} s")
    return {"plateau": result.plateau.bits, name: points}


if __name__ == "__main__":
    main()
