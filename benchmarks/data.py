"""From text to batches: speed, memory, and how long training waits for data.

    python benchmarks/data.py [--text PATH] [--tokenizer NAME] [--tokens 512] [--json FILE]
            [--waiting demo base4] [--updates 60 12]

The default text is four novels of the demo, with a tokenizer of 8,000 pieces trained on them. Four
tables:

    parts      reading, tokenising and cutting into sequences, separately, on one core
    start      the time to the first batch, with an empty cache and with a full one, and the peak
               memory of the process. Also for the same text on a single line, which can cost a
               tokenizer gigabytes. Includes loading the tokenizer, but not imports.
    collating  from sequences to batches on one core: masking, whole words, prediction order. The
               words are random, over 30,527 tokens of which a fifth continue a word, as in English
               text with BERT's vocabulary. (Masking depends on how tokens form words, not on what
               they mean.) annotated-mpnet, with whole-word masking in Cython, reaches 1.7 million
               tokens/s.
    waiting    the share of time that the training loop waits for a batch (`perf/data_wait`), in
               short runs with the shapes of `common.py`. The first quarter of the updates has its
               own column because it includes the wait for the first batch.

Training builds batches in another thread, so only the last table is time lost; the others show how
much reserve there is. Each measurement runs in its own process, one at a time. About two minutes on
2 CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import SHAPES, machine, write_json
from data_parts import (
    OBJECTIVES,
    PACKINGS,
    collate,
    first_batch,
    parts,
    prepare,
    wait,
    write_one_line,
)

CONVENTION = (
    "tokens of the text without special ones; in collating, all tokens of full sequences; parts "
    "and collating on one core; waiting: perf/data_wait of the training loop, averaged over time"
)
ONE_CORE = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments, *arguments.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        arguments.text, arguments.tokenizer = prepare(
            arguments.folder, arguments.text, arguments.tokenizer
        )
        print(machine(torch.device("cpu")))
        results = {
            "parts": show_parts(arguments),
            "start": show_start(arguments),
            "collating": show_collating(arguments),
            "waiting": show_waiting(arguments),
        }
    write_json("data", arguments, torch.device("cpu"), CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a file or a directory")
    parser.add_argument("--tokenizer", help="a directory or Hub name; default: train one")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--workers", type=int, default=0, help="tokenising processes")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per batch")
    parser.add_argument("--seconds", type=float, default=2.0, help="per line of collating")
    parser.add_argument("--waiting", nargs="*", choices=SHAPES, default=["demo", "base4"])
    parser.add_argument(
        "--updates", nargs="*", type=int, default=[60, 12], help="updates of each run"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if len(arguments.waiting) != len(arguments.updates):
        parser.error(
            f"--updates has {len(arguments.updates)} values; expected one for each shape of "
            f"--waiting: {' '.join(arguments.waiting)}"
        )
    if any(updates < 2 for updates in arguments.updates):
        parser.error(
            f"--updates is {min(arguments.updates)}; expected at least 2 (the first quarter of "
            "them is reported separately)"
        )
    return arguments


def measure(arguments: argparse.Namespace, what: str, *which: str) -> dict[str, float]:
    """Make the measurement of one process."""
    text, tokenizer, tokens = arguments.text, arguments.tokenizer, arguments.tokens
    match what:
        case "parts":
            return parts(text, tokenizer, tokens, arguments.folder)
        case "start":
            return first_batch(text, tokenizer, tokens, which[0], arguments.workers)
        case "collating":
            return {
                name: collate(name, tokens, arguments.batch_size, arguments.seconds)
                for name in OBJECTIVES
            }
        case _:
            return wait(text, tokenizer, which[0], int(which[1]), arguments.folder)


def run_child(
    arguments: argparse.Namespace,
    *child: str,
    text: Path | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, float]:
    """Measure in a new process, and return its results."""
    command = [sys.executable, __file__, "--text", str(text or arguments.text)]
    for name in ("tokenizer", "tokens", "workers", "batch_size", "seconds", "folder"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--child", *child]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def show_parts(arguments: argparse.Namespace) -> dict[str, float]:
    found = run_child(arguments, "parts", environment=ONE_CORE)
    tokens = found["tokens"]
    print(f"\n{'on one core':<24}{'seconds':>10}{'million tokens/s':>18}")
    for name in ("reading", "tokenising", *(f"cutting, {each}" for each in PACKINGS)):
        print(f"{name:<24}{found[name]:>10.3f}{tokens / found[name] / 1e6:>18.2f}")
    return found


def show_start(arguments: argparse.Namespace) -> list[dict[str, object]]:
    one_line = write_one_line(arguments.text, arguments.folder / "one_line.txt")
    runs = [(arguments.text, packing) for packing in PACKINGS] + [(one_line, "full")]
    print(
        f"\n{'text':<14}{'packing':<11}{'first batch s':>14}{'tokens/s':>12}{'fill':>8}"
        f"{'memory MB':>11}{'second start s':>16}"
    )
    results: list[dict[str, object]] = []
    for number, (text, packing) in enumerate(runs):
        cache = {"HF_DATASETS_CACHE": str(arguments.folder / f"cache{number}")}
        first, second = (
            run_child(arguments, "start", packing, text=text, environment=cache) for _ in range(2)
        )
        results.append({"text": text.name, "packing": packing, **first, "second": second})
        print(
            f"{text.name[:13]:<14}{packing:<11}{first['seconds']:>14.1f}"
            f"{first['tokens'] / first['seconds']:>12,.0f}{first['fill']:>8.2%}"
            f"{first['megabytes']:>11.0f}{second['seconds']:>16.2f}"
        )
    return results


def show_collating(arguments: argparse.Namespace) -> dict[str, float]:
    found = run_child(arguments, "collating", environment=ONE_CORE)
    print(f"\n{'collating, on one core':<24}{'million tokens/s':>18}{'µs per sequence':>17}")
    for name, speed in found.items():
        print(f"{name:<24}{speed / 1e6:>18.2f}{arguments.tokens / speed * 1e6:>17.1f}")
    return found


def show_waiting(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    print(f"\n{'waiting':<10}{'updates':>9}{'s per update':>13}{'first quarter':>15}{'then':>9}")
    results = {}
    for shape, updates in zip(arguments.waiting, arguments.updates, strict=True):
        found = results[shape] = run_child(arguments, "waiting", shape, str(updates))
        print(
            f"{shape:<10}{updates:>9}{found['seconds_per_update']:>13.3f}"
            f"{found['first_quarter']:>15.3%}{found['then']:>9.3%}"
        )
    return results


if __name__ == "__main__":
    main()
