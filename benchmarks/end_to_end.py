"""Which loss does each network reach in the same time, on the same text?

    python benchmarks/end_to_end.py [--minutes 2] [--seeds 1 2 3] [--with mpnet mlm hf ...]
            [--preset demo] [--text FILE_OR_DIRECTORY --tokenizer DIRECTORY]
            [--picture FILE.svg] [--json FILE] [-- FLAGS OF pretrain-mpnet ...]

Tokens per second say how fast a network reads, not how well it learns, and MPNet's step does more
work per token than plain masked language modelling. Here every contestant trains for the same time,
and its final loss counts:

    mpnet           ours, MPNet's objective, local start (`mpnet/local_start.py`)
    mpnet-normal    the same, starting from N(0, 0.02) as in the paper
    mlm             ours, plain masked language modelling, local start
    mlm-normal      the same, starting as in the paper
    hf              transformers' MPNetForMaskedLM with its own initialisation
    hf-local        the same network, starting from the weights of `mlm`

The last two run in a plain PyTorch loop, with transformers' DataCollatorForLanguageModeling (15 %
of the tokens: 80 % masked, 10 % random, 10 % kept).

**What is equal.** Text, tokenizer, packed sequences and their order, architecture, AdamW with the
same parameter groups, clipping, batch size and learning rates, batches built in another thread.
Ours and `hf-local` start with the output bias at the token frequencies (`--head-bias`, from the
preset); `hf` starts with zeros, as in transformers. The learning rate is the preset's; `-- --lr
2e-3` changes it for all.

**The number of updates is fixed in advance.** Each contestant first makes some updates for
calibration; they are thrown away. The schedule (5 % warm-up, then linear decay to zero) is for as
many updates as should fit into the time. The table shows the seconds that they really took. Run
nothing else on the machine.

**Metrics**, on the validation text with the same masks for all, in bits per predicted token:

    tokens   plain MLM, single tokens masked, as `hf` is trained
    words    plain MLM, whole words masked, as ours are trained
    mpnet    MPNet's own objective, for the networks trained with it

Eight times during a run the clock stops and `words` is evaluated. `--picture` draws these curves,
averaged over the seeds. The last lines say when each contestant reached the final loss of `hf`.
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
from typing import Any

import datasets
import torch

from annotated_mpnet.runs.preparation import measure_plateau
from annotated_mpnet.runs.texts import read_text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.parsing import parse_pretrain
from common import Found, machine, parse_with_run_flags, write_json
from data_parts import prepare
from learners import LEARNERS, METRICS, Curve, calibrate, judge, time_to, train

CONVENTION = (
    "bits per predicted token on the validation text, with the same masks for all; tokens are "
    "input tokens without padding; seconds of training, without evaluation and preparation"
)
EVALUATED_AT = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Evaluate a network after these shares of its updates."""


def main() -> None:
    arguments = parse()
    if arguments.learner:
        print(json.dumps(run(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        text, arguments.tokenizer = prepare(arguments.folder, arguments.text, arguments.tokenizer)
        if arguments.text is None:
            # The demo has a novel for validation.
            arguments.valid, arguments.text = text.parent / "valid.txt", text
        device = torch.device("cpu")
        flags = " ".join([f"pretrain-mpnet --preset {arguments.preset}", *arguments.flags])
        print(textwrap.fill(f"{arguments.minutes:g} minutes each of {flags}", 100))
        print(machine(device))
        print(
            f"{'':<13}{'seed':>5}{'updates':>8}{'seconds':>8}{'tokens/s':>9}"
            + "".join(f"{name:>8}{'acc':>6}" for name in METRICS)
        )
        results = [
            show(run_child(arguments, name, seed), name, seed)
            for seed in arguments.seeds
            for name in arguments.learners
        ]
    show_summary(arguments, results)
    if arguments.picture is not None:
        draw(arguments.picture, results)
    write_json("end_to_end", arguments, device, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="training time of each contestant"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--with", dest="learners", nargs="+", choices=LEARNERS, default=list(LEARNERS)
    )
    parser.add_argument("--preset", choices=["demo", "tiny"], default="demo")
    parser.add_argument("--text", type=Path, help="default: the demo's novels")
    parser.add_argument("--tokenizer", help="default: train one of 8,000 pieces on the text")
    parser.add_argument("--picture", type=Path, help="draw the curves: .svg or .png")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--valid", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--learner", choices=LEARNERS, help=argparse.SUPPRESS)
    arguments = parse_with_run_flags(parser)
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes:g}; expected more than 0")
    return arguments


def run_child(arguments: argparse.Namespace, name: str, seed: int) -> Found:
    """Train and evaluate a contestant in its own process."""
    command = [sys.executable, __file__, "--minutes", str(arguments.minutes)]
    command += ["--seeds", str(seed), "--folder", str(arguments.folder), "--learner", name]
    command += ["--preset", arguments.preset, "--text", str(arguments.text)]
    command += ["--tokenizer", str(arguments.tokenizer)]
    if arguments.valid is not None:
        command += ["--valid", str(arguments.valid)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(arguments.folder / "cache")}
    done = subprocess.run(
        [*command, "--", *arguments.flags], env=environment, stdout=subprocess.PIPE, check=True
    )
    found: Found = json.loads(done.stdout)
    return found


def run(arguments: argparse.Namespace) -> Found:
    """Train a contestant for its time; return its updates, seconds, tokens and losses."""
    datasets.disable_progress_bars()
    (seed,) = arguments.seeds
    config = configuration(arguments, seed)
    text = read_text(config.data, seed)
    make = LEARNERS[arguments.learner]
    budget = 60 * arguments.minutes
    each = calibrate(make(config, text, 1000), budget / 20)
    updates = max(1, round(budget / each))
    learner = make(config, text, updates)
    found: Found = {"updates": updates, "calibrated_seconds_per_update": each}
    found |= train(learner, updates, [max(1, round(share * updates)) for share in EVALUATED_AT])
    plateau = measure_plateau(text)
    assert plateau is not None
    found["plateau_bits"] = plateau.bits
    for name in METRICS:
        # MPNet's objective makes sense only for networks trained with it.
        if name != "mpnet" or arguments.learner.startswith("mpnet"):
            bits, accuracy = judge(learner, name)
            found |= {f"{name}_bits": bits, f"{name}_accuracy": accuracy}
    return found


def configuration(arguments: argparse.Namespace, seed: int) -> PretrainingConfig:
    """Return the settings of a run on the text of the command line."""
    flags = ["--preset", arguments.preset, "--train-dir", str(arguments.text)]
    flags += ["--seed", str(seed), "--tokenizer-name", arguments.tokenizer, "--test-file", "None"]
    if arguments.valid is not None:
        flags += ["--valid-file", str(arguments.valid), "--valid-fraction", "0"]
    else:
        flags += ["--valid-file", "None", "--valid-fraction", "0.02"]
    return parse_pretrain([*flags, *arguments.flags]).settings


def show(found: Found, name: str, seed: int) -> Found:
    """Print a line of the table; return the result with its name and seed."""
    cells = "".join(
        f"{found[f'{each}_bits']:>8.3f}{found[f'{each}_accuracy']:>6.3f}"
        if f"{each}_bits" in found
        else f"{'-':>8}{'-':>6}"
        for each in METRICS
    )
    print(
        f"{name:<13}{seed:>5}{found['updates']:>8,}{found['seconds']:>8.1f}"
        f"{found['tokens'] / found['seconds']:>9,.0f}{cells}",
        flush=True,
    )
    return {"learner": name, "seed": seed, **found}


def show_summary(arguments: argparse.Namespace, results: list[Found]) -> None:
    """Print the plateau, medians over the seeds, and the times to the final loss of `hf`."""
    print(f"guessing by frequency: {results[0]['plateau_bits']:.3f} bits (whole words)")
    for name in arguments.learners:
        rows = [row for row in results if row["learner"] == name]
        parts = []
        for key in METRICS:
            if f"{key}_bits" in rows[0]:
                bits = [row[f"{key}_bits"] for row in rows]
                spread = f" ({min(bits):.2f}-{max(bits):.2f})" if len(rows) > 1 else ""
                parts.append(f"{key} {statistics.median(bits):.2f}{spread}")
        print(textwrap.fill(f"median of {len(rows)}, {name}: {', '.join(parts)} bits", 100))
    for seed in arguments.seeds:
        of_seed = {row["learner"]: row for row in results if row["seed"] == seed}
        if "hf" not in of_seed:
            continue
        final = of_seed["hf"]["curve"][-1][1]
        times = [
            f"{name} {'never' if seconds is None else f'{seconds:.1f} s'}"
            for name, row in of_seed.items()
            for seconds in [time_to(row["curve"], final)]
        ]
        line = f"seed {seed}, time to hf's final {final:.2f} bits (words): {', '.join(times)}"
        print(textwrap.fill(line, 100))


def draw(path: Path, results: list[Found]) -> None:
    """Draw the curves, averaged over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(row["learner"] for row in results):
        seconds, bits = mean_curve([row["curve"] for row in results if row["learner"] == name])
        axes.plot(seconds, bits, marker="o", markersize=3, label=LABELS[name])
    axes.axhline(results[0]["plateau_bits"], linestyle="--", color="gray", label="plateau")
    make_plain(axes, "seconds of training", "bits per masked token")
    axes.legend(labelcolor=GRAY, framealpha=0, fontsize=8)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def make_plain(axes: Any, x: str, y: str) -> None:
    """Name the axes, and give them one gray that can be read on a white page and on a black one."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for part in (axes.xaxis.label, axes.yaxis.label, *axes.spines.values()):
        part.set_color(GRAY)
    axes.tick_params(colors=GRAY)
    axes.grid(alpha=0.3)


GRAY = "#808080"
LABELS = {
    "mpnet": "MPNet, local start",
    "mpnet-normal": "MPNet, start as in the paper",
    "mlm": "MLM, local start",
    "mlm-normal": "MLM, start as in the paper",
    "hf": "Hugging Face's MPNet",
    "hf-local": "Hugging Face's MPNet with our start",
}


def mean_curve(curves: list[Curve]) -> tuple[list[float], list[float]]:
    """Average times and losses, point by point.

    >>> mean_curve([[(1.0, 9.0), (2.0, 8.0)], [(3.0, 9.0), (4.0, 7.0)]])
    ([2.0, 3.0], [9.0, 7.5])
    """
    points = [
        [statistics.mean(numbers) for numbers in zip(*at, strict=True)]
        for at in zip(*curves, strict=True)
    ]
    seconds, bits = zip(*points, strict=True)
    return list(seconds), list(bits)


if __name__ == "__main__":
    main()
