"""What is the objective worth? MPNet, MLM and PLM in the same time, and in the same updates.

    python benchmarks/objectives.py [--minutes 10] [--seeds 1 2 3] [--learners mpnet mlm plm hf]
            [--preset tiny] [--text FILE_OR_DIRECTORY --tokenizer DIRECTORY] [--at 0.25 0.5 1]
            [--stsb DIR] [--probe-seeds 1] [--probe-lr 1e-3] [--examples 2000] [--masked FILE]
            [--out checkpoints/objectives] [--picture FILE.svg] [--json FILE]
            [-- FLAGS OF pretrain-mpnet ...]

`mpnet`, `mlm` and `plm` are the same network with the same weights at the start, the same
sequences in the same order, whole words masked, and the same optimizer (`-- --optimizer muon` for
another than AdamW). `hf` is transformers' MPNetForMaskedLM in a plain loop with AdamW, initialised
and masked as `run_mlm.py` does it (single tokens, 15 %). `end_to_end.py` says what else is equal,
and which other learners there are.

**The same time.** First all learners make updates in turn, each in its own process. The median over
the turns is the cost of an update, so other work on the machine slows all of them alike. The number
of updates is the time divided by this cost, and the learning rate's schedule ends with the last
one. The table shows the seconds that they really took.

**The same updates.** As many as the slowest learner makes; the others make a second, shorter run.

At each share `--at` of a run the clock stops, and the network is saved. `probe.py` says what the
scores of such a checkpoint are; `tuned`, which takes the longest, is asked at the end only. ± is
half a 95 % interval of the mean over the seeds, by Student's t. The picture shows the mean, and a
band from the lowest to the highest seed: on the left the same time, over seconds; on the right the
same updates, over tokens.

The folder `--out` keeps the checkpoints, and results.jsonl with a line per measurement. Start the
command again to continue with what is missing, for example after adding seeds or learners. A run
that was interrupted starts again from its beginning.

Run nothing else on the machine. It takes at most learners x seeds x 2 x minutes, and the probe of
each checkpoint. The demo's novels are soon repeated, so for a longer run take more text:

    train-mpnet-tokenizer novels.txt --vocab-size 8000 --output novels-tokenizer
    python benchmarks/objectives.py --text novels.txt --tokenizer novels-tokenizer --minutes 5
        --stsb DIR --picture objectives.svg --json objectives.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import datasets

from annotated_mpnet.conversion import export_to_hugging_face
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import ConfigError, UserError
from annotated_mpnet.runs.texts import read_text
from annotated_mpnet.text.sources import LocalFiles
from annotated_mpnet.text.tokenizer import load_tokenizer, write_tokenizer
from annotated_mpnet.training.loader import prefetch
from common import Found, Results, machine, parse_with_run_flags, versions, write_json
from contestants import Worker, serve
from data_parts import prepare
from end_to_end import configuration
from learners import (
    CPU,
    LEARNERS,
    PREFETCHED_UPDATES,
    WARM_UPDATES,
    HuggingFace,
    Learner,
    Ours,
    train,
)
from objectives_report import draw, show_summary
from probe import TASKS, Tasks, add_flags, check_flags, probe, read_tasks

LEARNERS_HERE = LEARNERS | {"plm": partial(Ours, mode="plm", start="local")}
TURNS = 9
STEPS_OF_A_TURN = 10

CONVENTION = (
    "kind cost: seconds of an update, one value for each turn; run: seconds of training without "
    "evaluation; scores: see probe.py, after an update of a run"
)
COMPARED = (
    *("minutes", "preset", "flags", "text", "tokenizer", "at"),
    *("stsb", "examples", "masked", "probe_seeds", "probe_lr"),
)
"""The settings without which a restart would continue other measurements."""


def main() -> None:
    arguments = parse()
    datasets.disable_progress_bars()
    try:
        if arguments.worker:
            make_updates(arguments)
        elif arguments.learner:
            print(json.dumps(run(arguments)))
        else:
            measure(arguments)
    except UserError as error:
        print(f"objectives.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--learners", nargs="+", choices=LEARNERS_HERE, default=["mpnet", "mlm", "plm", "hf"]
    )
    parser.add_argument("--preset", choices=["demo", "tiny", "small"], default="tiny")
    parser.add_argument("--text", type=Path, help="default: the demo's novels")
    parser.add_argument("--tokenizer", help="default: one of 8,000 pieces, learned from the text")
    parser.add_argument("--at", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    add_flags(parser)
    parser.add_argument("--probe-seeds", type=int, nargs="+", default=[1], help="of `tuned`")
    parser.add_argument("--probe-lr", type=float, default=1e-3, help="of `tuned`")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/objectives"))
    parser.add_argument("--picture", type=Path, help="draw the curves: .svg or .png")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=LEARNERS_HERE, help=argparse.SUPPRESS)
    parser.add_argument("--learner", choices=LEARNERS_HERE, help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, help=argparse.SUPPRESS)
    # Of the training text: nothing is chosen by it.
    parser.set_defaults(valid=None)
    arguments = parse_with_run_flags(parser)
    check_flags(parser, arguments)
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes:g}; expected more than 0")
    wrong = [share for share in arguments.at if not 0 < share <= 1]
    if wrong:
        parser.error(f"--at is {wrong[0]:g}; expected shares of a run, above 0 and at most 1")
    arguments.at = sorted({*arguments.at, 1.0})
    return arguments


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is missing in the folder, and show everything."""
    tasks = read_tasks(arguments.stsb, arguments.examples, arguments.masked)
    results = Results(arguments.out / "results.jsonl")
    begin(arguments, results)
    print(machine(CPU))
    by_time = count_updates(arguments, results)
    least = min(by_time.values())
    print(
        f"{'':<13}{'seed':>5}{'updates':>8}{'update':>8}{'seconds':>8}"
        + "".join(f"{task:>8}" for task in TASKS)
    )
    same = dict.fromkeys(by_time, least)
    runs = [
        (name, seed, updates[name])
        for updates in (by_time, same)
        for seed in arguments.seeds
        for name in arguments.learners
    ]
    # The slowest learner has one run for both.
    for key in dict.fromkeys(runs):
        train_and_probe(arguments, results, tasks, key)
    show_summary(f"the same time, {arguments.minutes:g} minutes", arguments, results, by_time)
    show_summary(f"the same updates, {least:,}", arguments, results, same)
    if arguments.picture is not None:
        draw(arguments, results, by_time, same)
    write_json("objectives", arguments, CPU, CONVENTION, results.lines)


def begin(arguments: argparse.Namespace, results: Results) -> None:
    """Prepare text and tokenizer, or take those of an earlier start with the same settings.

    Raises:
        ConfigError: the settings were others.
    """
    asked = {name: _plain(getattr(arguments, name)) for name in COMPARED}
    if len(results.lines) < 2:
        # Not even a cost was measured. A wrong path is found here, not by a child.
        results.begin_anew()
        if arguments.text is not None:
            LocalFiles.find(arguments.text, "--text")
        if arguments.tokenizer is not None:
            load_tokenizer(arguments.tokenizer)
        text, tokenizer = prepare(arguments.out.absolute(), arguments.text, arguments.tokenizer)
        results.add(
            "head",
            settings=asked,
            text=str(text),
            tokenizer=tokenizer,
            machine=machine(CPU),
            versions=versions(),
        )
    head = results.lines[0]
    for name, value in asked.items():
        if head["settings"][name] != value:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}, and {results.path} was measured with "
                f"{head['settings'][name]}; name another folder with --out"
            )
    arguments.text, arguments.tokenizer = Path(head["text"]), head["tokenizer"]


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def count_updates(arguments: argparse.Namespace, results: Results) -> dict[str, int]:
    """Return how many updates each learner makes in the time, by what an update costs it."""
    missing = [name for name in arguments.learners if results.find("cost", learner=name) is None]
    workers = {name: Worker(name, child_flags(arguments), __file__) for name in missing}
    for _ in range(TURNS):
        for worker in workers.values():
            worker.take_a_turn()
    for name, worker in workers.items():
        worker.end()
        results.add("cost", learner=name, seconds=worker.seconds)
    found = {}
    for name in arguments.learners:
        cost = results.find("cost", learner=name)
        assert cost is not None
        each = statistics.median(cost["seconds"])
        found[name] = max(1, round(60 * arguments.minutes / each))
        print(f"{name}: {1000 * each:.1f} ms an update, {found[name]:,} updates")
    return found


def child_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of this script that a process for one learner needs."""
    flags = ["--preset", arguments.preset, "--text", str(arguments.text)]
    flags += ["--tokenizer", arguments.tokenizer, "--out", str(arguments.out)]
    flags += ["--at", *map(str, arguments.at)]
    return [*flags, "--", *arguments.flags]


def make_updates(arguments: argparse.Namespace) -> None:
    """Be a `Worker`: make updates that are thrown away, some in each turn."""
    learner = learner_of(arguments.worker, arguments, arguments.seeds[0], 10_000)
    with closing(prefetch(learner.batches(), PREFETCHED_UPDATES)) as batches:
        numbers = iter(range(10_000))
        for _ in range(WARM_UPDATES):
            learner.update(next(numbers), next(batches))
        serve(lambda: learner.update(next(numbers), next(batches)), CPU, STEPS_OF_A_TURN)


def train_and_probe(
    arguments: argparse.Namespace, results: Results, tasks: Tasks, key: tuple[str, int, int]
) -> None:
    """Train a learner and probe its checkpoints, as far as it was not done before."""
    name, seed, updates = key
    whose = {"learner": name, "seed": seed, "updates": updates}
    trained = results.find("run", **whose)
    if trained is None:
        command = [sys.executable, __file__, "--learner", name, "--seeds", str(seed)]
        command += ["--updates", str(updates), *child_flags(arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE)
        if done.returncode != 0:  # it has said on stderr why
            sys.exit(done.returncode)
        trained = results.add("run", **whose, **json.loads(done.stdout))
    for update, seconds in zip(trained["saved_at"], trained["saved_seconds"], strict=True):
        found = results.find("scores", **whose, update=update)
        if found is None:
            model = folder_of(arguments.out, name, seed, updates) / f"update{update}"
            seeds = arguments.probe_seeds if update == updates else []
            scores = probe(str(model), tasks, seeds, arguments.probe_lr)
            tokens = trained["tokens"] * update // updates
            found = results.add(
                "scores", **whose, update=update, seconds=seconds, tokens=tokens, scores=scores
            )
        cells = [
            f"{statistics.mean(found['scores'][task]):>8.3f}"
            if task in found["scores"]
            else f"{'-':>8}"
            for task in TASKS
        ]
        print(
            f"{name:<13}{seed:>5}{updates:>8,}{update:>8,}{seconds:>8.1f}{''.join(cells)}",
            flush=True,
        )


def run(arguments: argparse.Namespace) -> Found:
    """Train a learner, save it on the way, and return when that was."""
    (seed,), name, updates = arguments.seeds, arguments.learner, arguments.updates
    saved_at = sorted({max(1, round(share * updates)) for share in arguments.at})
    left = iter(saved_at)

    def save_it(learner: Learner) -> float:
        save(learner, folder_of(arguments.out, name, seed, updates) / f"update{next(left)}")
        return 0.0

    found = train(learner_of(name, arguments, seed, updates), updates, saved_at, save_it)
    seconds = [at for at, _ in found.pop("curve")]
    return {**found, "saved_at": saved_at, "saved_seconds": seconds}


def learner_of(name: str, arguments: argparse.Namespace, seed: int, updates: int) -> Learner:
    config = configuration(arguments, seed)
    return LEARNERS_HERE[name](config, read_text(config.data, seed), updates)


def folder_of(out: Path, name: str, seed: int, updates: int) -> Path:
    return out / "models" / f"{name}-seed{seed}-{updates}"


def save(learner: Learner, directory: Path) -> None:
    """Write a network with its tokenizer, in Hugging Face's format."""
    tokenizer = learner.text.tokenizer
    directory.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(learner, HuggingFace):
        with quiet_transformers():
            learner.model.save_pretrained(directory)
        write_tokenizer(tokenizer, directory)
    elif isinstance(learner, Ours):
        export_to_hugging_face(learner.model, directory, tokenizer=tokenizer, overwrite=True)


if __name__ == "__main__":
    main()
