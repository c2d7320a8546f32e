"""The same text, the same time: what loss does each way of pretraining reach?

    python benchmarks/end_to_end.py [--minutes 2] [--seeds 1 2 3] [--with mpnet mlm hf]
            [--json FILE] [-- FLAGS OF pretrain-mpnet ...]

Tokens per second say how fast a network reads, not what it learns from what it read. MPNet's step
does more for a token than plain masked language modelling, and so reads less. Here each contestant
has the same minutes, and what counts is the loss at their end:

    mpnet    ours, the full objective
    mlm      ours, plain masked language modelling
    hf       transformers' MPNetForMaskedLM in a plain loop of PyTorch, masked by transformers'
             DataCollatorForLanguageModeling (15 %: 80 % masks, 10 % random, 10 % kept)

**What is equal.** Text, tokenizer, packed rows and their order, architecture, the very weights to
begin with, the head's bias among them (`--head-bias frequencies` of the demo: without it, such
short runs learn nothing but how often words occur, whoever makes them); AdamW with the same groups,
clipping, batch and learning rates; batches made ahead in a thread. So the comparison is about the
step and the objective.

**The end of the schedule** is the end of the time. Each contestant first makes some updates that
are thrown away, to see how many it will make; the schedule (5 % warm-up, then down to zero) is for
so many. If the machine gets slower or faster in the meantime, the time is not quite kept: it is
reported. Two threads of a busy machine are no place for this: let nothing else run.

**Yardsticks**, on the validation text, whose masks are the same for all, in bits per predicted
token:

    tokens   plain MLM, single tokens masked, as `hf` is trained
    words    plain MLM, whole words masked, as ours are trained
    mpnet    MPNet's own: for the network trained with it, which was made to predict so

The learning rate is the demo's, chosen for `mpnet`; `-- --lr 2e-3` tries another, for all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import datasets
import torch

from annotated_mpnet.data.texts import read_text
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.parsing import parse_pretrain
from annotated_mpnet.preparation import measure_plateau
from common import machine, write_json
from data_parts import prepare
from learners import LEARNERS, YARDSTICKS, calibrate, judge, train

CONVENTION = (
    "bits per predicted token on the validation text, the same masks for all; tokens are input "
    "tokens without padding; seconds of training without evaluation and preparation"
)


def main() -> None:
    arguments = parse()
    if arguments.learner:
        print(json.dumps(run(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        prepare(arguments.folder, None, None)
        device = torch.device("cpu")
        flags = " ".join(["pretrain-mpnet --preset demo", *arguments.flags])
        print(textwrap.fill(f"{arguments.minutes:g} minutes each of {flags}", 100))
        print(machine(device))
        print(
            f"{'':<7}{'seed':>6}{'updates':>9}{'seconds':>9}{'tokens/s':>10}"
            + "".join(f"{name:>9}{'acc':>7}" for name in YARDSTICKS)
        )
        results = [
            show(run_child(arguments, name, seed), name, seed)
            for seed in arguments.seeds
            for name in arguments.learners
        ]
    show_medians(arguments, results)
    write_json("end_to_end", arguments, device, CONVENTION, results)


def parse() -> argparse.Namespace:
    # What stands behind `--` is not ours.
    given = sys.argv[1:]
    own = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--with", dest="learners", nargs="+", choices=LEARNERS, default=LEARNERS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--learner", choices=LEARNERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given[:own])
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes:g}; expected more than 0")
    arguments.flags = given[own + 1 :]
    try:
        parse_pretrain(["--preset", "demo", *arguments.flags])
    except ConfigError as error:
        parser.error(str(error))
    return arguments


def run_child(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Train and judge a learner in a process of its own, as its user would start it."""
    command = [sys.executable, __file__, "--minutes", str(arguments.minutes)]
    command += ["--seeds", str(seed), "--folder", str(arguments.folder), "--learner", name]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(arguments.folder / "cache")}
    done = subprocess.run(
        [*command, "--", *arguments.flags], env=environment, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Train a learner for its time, and return what it did and what it is worth."""
    datasets.disable_progress_bars()
    novels, (seed,) = arguments.folder / "novels", arguments.seeds
    flags = ["--preset", "demo", "--train-dir", str(novels / "train"), "--seed", str(seed)]
    flags += ["--valid-file", str(novels / "valid.txt"), "--test-file", str(novels / "test.txt")]
    flags += ["--tokenizer-name", str(arguments.folder / "tokenizer"), *arguments.flags]
    config = parse_pretrain(flags).settings
    text = read_text(config.data, seed)
    make = LEARNERS[arguments.learner]
    budget = 60 * arguments.minutes
    each = calibrate(make(config, text, 1000), budget / 20)
    updates = max(1, round(budget / each))
    learner = make(config, text, updates)
    found = {"updates": updates, "calibrated_seconds_per_update": each}
    found |= train(learner, updates)
    plateau = measure_plateau(text)
    assert plateau is not None
    found["plateau_bits"] = plateau.bits
    for name in YARDSTICKS:
        # A network that was never asked in MPNet's way has no loss by that yardstick.
        if name != "mpnet" or arguments.learner == "mpnet":
            bits, accuracy = judge(learner, name)
            found |= {f"{name}_bits": bits, f"{name}_accuracy": accuracy}
    return found


def show(found: dict[str, float], name: str, seed: int) -> dict[str, object]:
    """Print a line, and return it."""
    cells = "".join(
        f"{found[f'{each}_bits']:>9.3f}{found[f'{each}_accuracy']:>7.3f}"
        if f"{each}_bits" in found
        else f"{'-':>9}{'-':>7}"
        for each in YARDSTICKS
    )
    print(
        f"{name:<7}{seed:>6}{found['updates']:>9,}{found['seconds']:>9.1f}"
        f"{found['tokens'] / found['seconds']:>10,.0f}{cells}",
        flush=True,
    )
    return {"learner": name, "seed": seed, **found}


def show_medians(arguments: argparse.Namespace, results: list[dict[str, object]]) -> None:
    """Print the medians over the seeds, where there are several, and the plateau."""
    print(f"guessing by frequency: {results[0]['plateau_bits']:.3f} bits (whole words)")
    if len(arguments.seeds) < 2:
        return
    for name in arguments.learners:
        rows = [row for row in results if row["learner"] == name]
        medians = {
            key: statistics.median(float(str(row[key])) for row in rows)
            for key in (f"{each}_bits" for each in YARDSTICKS)
            if key in rows[0]
        }
        told = ", ".join(f"{key.removesuffix('_bits')} {bits:.3f}" for key, bits in medians.items())
        print(f"median of {len(rows)} seeds, {name}: {told} bits")


if __name__ == "__main__":
    main()
