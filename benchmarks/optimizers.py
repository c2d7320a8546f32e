"""AdamW and Muon, each at its own rates, for the same time: which reaches the lower loss?

    python benchmarks/optimizers.py [--preset demo] [--updates 1000] [--seeds 1 2 3]
            [--with adamw:3e-3 muon:3e-3 muon:6e-3:3e-3 ...]
            [--text FILE_OR_DIRECTORY --tokenizer DIRECTORY] [--keep FILE.jsonl] [--json FILE]
            [-- FLAGS OF pretrain-mpnet ...]

A contestant is an optimizer and its peak learning rate. Muon has two, that of the matrices and,
after another colon, AdamW's of all other parameters (default: the preset's rate). What Muon does is
told in `training/muon.py`.

**The same time.** A second is not the same on a machine that has other work. So first updates of
the two are timed in turn, two of each at a time, and the median of the quotients says how much
longer one with Muon takes. `--updates` are AdamW's; Muon makes as many fewer as its updates take
longer, and its schedule (5 % warm-up, then linearly to zero) is for that number.

All else is the same: network, start, text, order, masks, clipping, decay. The loss is that of the
objective (`--input-mode`), in bits per predicted token of the validation text, by the same masks.

With `--keep` each number goes to a file as soon as it is known, and what is there already is not
measured again: quotient and runs of that file belong together.
"""

import argparse
import dataclasses
import statistics
import tempfile
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import datasets

from annotated_mpnet.runs.texts import Text, read_text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.parsing import parse_pretrain
from annotated_mpnet.tracking.tracker import nats_to_bits
from annotated_mpnet.training.loader import prefetch
from common import Found, Results, machine, parse_with_run_flags, write_json
from data_parts import prepare
from learners import CPU, Ours, judge

CONVENTION = (
    "bits per predicted token on the validation text, by the objective of training, the same masks "
    "for all; the same time: updates times the cost of one, measured in turn"
)
SHARES = 10
"""Parts of a run, for each of which the mean loss of training is kept."""


class Contestant(NamedTuple):
    """An optimizer and its rates; `rest` is that of what Muon does not orthogonalise."""

    optimizer: str
    rate: float
    rest: float | None = None

    def __str__(self) -> str:
        rest = "" if self.rest is None else f":{self.rest:g}"
        return f"{self.optimizer}:{self.rate:g}{rest}"


def contestant(text: str) -> Contestant:
    """Read a contestant off the command line.

    >>> contestant("adamw:3e-3"), str(contestant("muon:6e-3:0.003"))
    (Contestant(optimizer='adamw', rate=0.003, rest=None), 'muon:0.006:0.003')
    """
    name, *rates = text.split(":")
    most = {"adamw": 1, "muon": 2}.get(name, 0)
    try:
        numbers = [float(rate) for rate in rates]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= most or not all(0 < number < 10 for number in numbers):
        raise argparse.ArgumentTypeError(f"is {text}; expected adamw:RATE or muon:RATE[:RATE]")
    return Contestant(name, *numbers)


def main() -> None:
    arguments = parse()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        text, tokenizer = prepare(Path(folder), arguments.text, arguments.tokenizer)
        flags = ["--preset", arguments.preset, "--train-dir", str(text), "--test-file", "None"]
        flags += ["--tokenizer-name", tokenizer]
        if arguments.text is None:
            # The demo's novels, of which one is for validation.
            flags += ["--valid-file", str(text.parent / "valid.txt"), "--valid-fraction", "0"]
        else:
            flags += ["--valid-file", "None", "--valid-fraction", "0.02"]
        config = parse_pretrain([*flags, *arguments.flags]).settings
        print(machine(CPU))
        results = measure(arguments, config)
    show_summary(arguments, results)
    write_json("optimizers", arguments, CPU, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["demo", "tiny"], default="demo")
    parser.add_argument("--updates", type=int, default=1000, help="of AdamW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--with", dest="contestants", type=contestant, nargs="+", metavar="NAME:RATE[:RATE]",
        default=[Contestant("adamw", 3e-3), Contestant("muon", 3e-3)],
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=30, help="of the quotient")
    parser.add_argument("--text", type=Path, help="default: the demo's novels")
    parser.add_argument("--tokenizer", help="default: one of 8,000 pieces, learned from the text")
    parser.add_argument("--keep", type=Path, help="JSON lines: found there, or appended")
    parser.add_argument("--json", type=Path)
    arguments = parse_with_run_flags(parser)
    for name in ("updates", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; expected 1 or more")
    return arguments


def measure(arguments: argparse.Namespace, config: PretrainingConfig) -> list[Found]:
    """Measure what is not kept yet, and return it all in the order of the command line."""
    kept = Results(arguments.keep)
    common = {"preset": arguments.preset, "flags": arguments.flags}
    results: list[Found] = []
    quotient = 1.0
    texts: dict[int, Text] = {}

    def text_of(seed: int) -> Text:
        # Which documents are held out does not depend on the seed, their order does.
        if seed not in texts:
            texts[seed] = read_text(config.data, seed)
        return texts[seed]

    if any(each.optimizer == "muon" for each in arguments.contestants):
        seed = arguments.seeds[0]
        cost = kept.find("cost", **common)
        if cost is None:
            measured = cost_of_muon(config, text_of(seed), arguments.rounds)
            cost = kept.add("cost", **common, **measured)
        quotient = cost["quotient"]
        results.append(cost)
        print(
            f"an update with Muon takes {quotient:.3f} times as long as one with AdamW "
            f"({1000 * cost['adamw']:.0f} ms)"
        )
    print(f"{'':<20}{'seed':>5}{'updates':>8}{'seconds':>8}{'bits':>8}{'accuracy':>9}")
    for seed in arguments.seeds:
        for each in arguments.contestants:
            updates = arguments.updates
            if each.optimizer == "muon":
                updates = max(1, round(updates / quotient))
            key = {**common, "contestant": str(each), "seed": seed, "updates": updates}
            found = kept.find("run", **key)
            if found is None:
                measured = train(config, text_of(seed), each, seed, updates)
                found = kept.add("run", **key, **measured)
            results.append(found)
            print(
                f"{each!s:<20}{seed:>5}{updates:>8,}{found['seconds']:>8.1f}{found['bits']:>8.3f}"
                f"{found['accuracy']:>9.3f}",
                flush=True,
            )
    return results


def build(config: PretrainingConfig, text: Text, each: Contestant, seed: int, updates: int) -> Ours:
    """Return a learner with an optimizer of its own."""
    optimization = dataclasses.replace(config.optimization, lr=each.rate)
    if each.optimizer == "muon":
        rest = config.optimization.lr if each.rest is None else each.rest
        optimization = dataclasses.replace(
            optimization, optimizer="muon", lr=rest, muon_lr=each.rate
        )
    config = dataclasses.replace(
        config,
        optimization=optimization,
        run=dataclasses.replace(config.run, seed=seed),
    )
    start = config.optimization.relative_bias_init
    return Ours(config, text, updates, config.objective.input_mode, start)


def cost_of_muon(config: PretrainingConfig, text: Text, rounds: int) -> Found:
    """Return the median seconds of an update of either, and of the quotient of neighbours."""
    rate = config.optimization.lr
    learners = [build(config, text, Contestant(name, rate), 1, 10**6) for name in ("adamw", "muon")]
    batch = next(learners[0].batches())
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for learner, spent in zip(learners, seconds, strict=True):
            started = time.perf_counter()
            for k in range(2):
                learner.update(2 * number + k, batch)
            spent.append((time.perf_counter() - started) / 2)
    adamw, muon = (spent[1:] for spent in seconds)
    quotients = [b / a for a, b in zip(adamw, muon, strict=True)]
    return {
        "adamw": statistics.median(adamw),
        "muon": statistics.median(muon),
        "quotient": statistics.median(quotients),
        "quotients": [round(each, 3) for each in quotients],
    }


def train(
    config: PretrainingConfig, text: Text, each: Contestant, seed: int, updates: int
) -> Found:
    """Make all updates of a contestant, and judge it at the end."""
    learner = build(config, text, each, seed, updates)
    batches = prefetch(learner.batches(), 2)
    started, losses, norms = time.perf_counter(), [], []
    for number in range(updates):
        result = learner.result(number, next(batches))
        losses.append(nats_to_bits(result.loss_sum.item() / result.num_predicted))
        norms.append(result.gradient_norm.item())
    seconds = time.perf_counter() - started
    batches.close()
    bits, accuracy = judge(learner, config.objective.input_mode)
    return {
        "seconds": seconds,
        "bits": bits,
        "accuracy": accuracy,
        "curve": [round(statistics.mean(part), 3) for part in parts(losses)],
        "longest_gradient": [round(max(part), 2) for part in parts(norms)],
    }


def parts(numbers: list[float]) -> list[list[float]]:
    """Cut into ten parts, of which none is empty.

    >>> [len(part) for part in parts([0.0] * 25)], len(parts([0.0] * 3))
    ([2, 3, 2, 3, 2, 3, 2, 3, 2, 3], 3)
    """
    count, shares = len(numbers), min(SHARES, len(numbers))
    cuts = [count * k // shares for k in range(shares + 1)]
    return [numbers[a:b] for a, b in pairwise(cuts)]


def show_summary(arguments: argparse.Namespace, results: list[Found]) -> None:
    """Print mean, least and most of each contestant over the seeds."""
    for each in arguments.contestants:
        bits = [row["bits"] for row in results if row.get("contestant") == str(each)]
        spread = f" ({min(bits):.2f}-{max(bits):.2f})" if len(bits) > 1 else ""
        line = f"mean of {len(bits)}, {each}: {statistics.mean(bits):.3f}{spread} bits"
        print(textwrap.fill(line, 100))


if __name__ == "__main__":
    main()
