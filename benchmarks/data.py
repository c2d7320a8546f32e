"""From text to batches: how fast, with how much memory, and whether training ever waits for it.

    python benchmarks/data.py [--text PATH] [--tokenizer NAME] [--tokens 512] [--json FILE]
            [--waiting demo base4] [--updates 60 12]

Without a text: four novels of the demo, and a tokenizer of 8,000 pieces learned from them. Four
tables:

    parts      reading, tokenising and cutting into rows, each by itself, on one core
    start      the time until the first batch stands there, with an empty cache and with a full one,
               and the largest memory of the process; also for the same text as one single line, for
               which a tokenizer likes to take gigabytes. Imports are not counted, loading the
               tokenizer is.
    collating  rows to batches on one core: masking, whole words, an order. Of random words over a
               vocabulary of 30,527 pieces, of which a fifth continue a word, about the share of
               running English in BERT's vocabulary. What tokens mean makes no difference to
               masking, how they form words does. annotated-mpnet, whose whole-word masking is
               written in Cython, reaches 1.7 million tokens a second.
    waiting    the share of its time that the training loop stands still for a batch
               (`perf/data_wait`), in short runs of the real loop, in the shapes of `common.py`. The
               first quarter of the updates is shown by itself: it waits for the very first batch.

A batch is made in a thread beside the loop, so that what counts is the last table; the others say
how far it is from changing. Everything runs in a process of its own, one after the other. About two
minutes on 2 CPU cores.
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
    "tokens of the text (special ones not counted), in collating tokens of full rows; parts and "
    "collating on one core; waiting: perf/data_wait of the training loop, by time"
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
    parser.add_argument("--tokenizer", help="a directory or a Hub name; else learned from the text")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--workers", type=int, default=0, help="processes that tokenise")
    parser.add_argument("--batch-size", type=int, default=32, help="rows that are collated at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line of collating")
    parser.add_argument("--waiting", nargs="*", choices=SHAPES, default=["demo", "base4"])
    parser.add_argument("--updates", nargs="*", type=int, default=[60, 12], help="of each run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if len(arguments.waiting) != len(arguments.updates):
        parser.error(
            f"--updates has {len(arguments.updates)} numbers; expected one for each shape of "
            f"--waiting: {' '.join(arguments.waiting)}"
        )
    if any(updates < 2 for updates in arguments.updates):
        parser.error("--updates: expected at least 2, of which the first is shown by itself")
    return arguments


def measure(arguments: argparse.Namespace, what: str, *which: str) -> dict[str, float]:
    """Return what one process measures."""
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
    """Measure in a process of its own, and return what it found."""
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
    print(f"\n{'collating, on one core':<24}{'million tokens/s':>18}{'µs per row':>12}")
    for name, speed in found.items():
        print(f"{name:<24}{speed / 1e6:>18.2f}{arguments.tokens / speed * 1e6:>12.1f}")
    return found


def show_waiting(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    print(f"\n{'waiting':<10}{'updates':>9}{'s an update':>13}{'first quarter':>15}{'then':>9}")
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
