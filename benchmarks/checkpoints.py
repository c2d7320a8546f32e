"""How much training time a checkpoint costs.

    python benchmarks/checkpoints.py [--shape base] [--sequences 1] [--length 128] [--rounds 5]
            [--interval 100] [--directory PATH] [--json FILE]

Trains MPNet-base with AdamW and saves checkpoints, by the training loop's own `Trainer.update` and
`Saver` (`checkpoints/saving.py`). Each round times the same number of updates three times:

    none         no checkpoint
    waiting      a checkpoint first; training starts when it is on disk
    overlapped   a checkpoint first; training goes on while it is written

The cost of a checkpoint is the extra time compared with `none` of the same round, as a median over
rounds, and as a share of `--interval` updates. There are enough updates for the whole write to fit;
if it does not, waiting for the rest of it counts.

The update is small (one sequence of 128 tokens by default), so that a round takes seconds rather
than minutes on a CPU. The cost in seconds hardly depends on the size of the update, so the share of
larger updates is smaller.

Also timed alone: the copy, the first time (into new memory) and later, and the write (files,
hashes, fsync, rename).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from annotated_mpnet.checkpoints.checkpoint import TrainState, checkpoint_name
from annotated_mpnet.checkpoints.run_directory import RunDirectory
from annotated_mpnet.checkpoints.saving import Saver
from annotated_mpnet.fast.allocator import keep_memory
from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.preparation import choose_attention
from annotated_mpnet.settings.config import RunConfig
from annotated_mpnet.tracking.tracker import Tracker
from annotated_mpnet.training.distributed import SharedNetwork, World
from annotated_mpnet.training.trainer import Trainer
from common import SHAPES, machine, make_batch, model_config, write_json

CONVENTION = (
    "seconds of the same updates with a checkpoint minus those without, in the same round; median "
    "over rounds; share of `interval` updates"
)
KINDS = ("none", "waiting", "overlapped")
START = TrainState(update=0, tokens_seen=0, predicted_seen=0, best_valid_bits=None, identity={})


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_memory()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        run = RunConfig(checkpoint_dir=Path(folder) / "run", keep_checkpoints=1)
        trainer, batch = build(arguments, device)
        with (
            RunDirectory(run.checkpoint_dir, False, False) as directory,
            Saver(trainer, directory, run, lambda tokenizer: None) as saver,
        ):
            results = measure(arguments, Bench(trainer, saver, batch))
    table(results, device)
    write_json("checkpoints", arguments, device, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--sequences", type=int, default=1, help="per update")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interval", type=int, default=100, help="updates between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--directory", type=Path, help="write below this directory; default: a temporary one"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def build(arguments: argparse.Namespace, device: torch.device) -> tuple[Trainer, Batch]:
    """Return a trainer for a shape's network, and the batch of all its updates."""
    shape = replace(SHAPES[arguments.shape], length=arguments.length)
    optimization = OptimizationConfig(total_updates=10**6, lr=1e-5)
    model = MPNetForPretraining(model_config(shape, dropout=0.1))
    model.use_attention(ATTENTIONS[choose_attention("auto", device)[0]])
    network = SharedNetwork(model, World(), device)
    optimizer = build_optimizer(model, optimization, device)
    bf16 = device.type == "cuda"
    trainer = Trainer(network, optimizer, optimization, "mpnet", 12345, bf16, Tracker.silent())
    return trainer, make_batch(shape, arguments.sequences)


@dataclass
class Bench:
    """Makes the updates and checkpoints that are timed."""

    trainer: Trainer
    saver: Saver
    batch: Batch
    update: int = 0

    def train(self, updates: int) -> None:
        """Make updates, and wait until the last one has finished."""
        for _ in range(updates):
            self.trainer.update(self.update, [self.batch])
            self.update += 1
        self.trainer.catch_up()

    def save(self) -> None:
        """Start a checkpoint of the current state; returns after the copy."""
        state = replace(START, update=self.update)
        self.saver.save(checkpoint_name(self.update), state, None)

    def train_and_save(self, kind: str, updates: int) -> float:
        """Return the seconds of these updates with a checkpoint of one of the `KINDS`."""

        def work() -> None:
            if kind != "none":
                self.save()
            if kind == "waiting":
                self.saver.finish()
            self.train(updates)
            self.saver.finish()

        return timed(work)


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(arguments: argparse.Namespace, bench: Bench) -> dict[str, object]:
    """Return all measurements, in seconds."""
    bench.train(3)
    update = timed(lambda: bench.train(3)) / 3
    copies, writes = [], []
    for _ in range(3):
        bench.train(1)
        copies.append(timed(bench.save))
        writes.append(timed(bench.saver.finish))
    # Twice as long as a write on an idle machine.
    updates = max(3, round(2 * statistics.median(writes) / update))
    print(
        f"update {update:.3f} s, write {statistics.median(writes):.2f} s, copy {copies[-1]:.2f} s"
    )
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({kind: bench.train_and_save(kind, updates) for kind in KINDS})
        print("  ".join(f"{kind} {seconds:.2f} s" for kind, seconds in rounds[-1].items()))
    update = statistics.median(each["none"] for each in rounds) / updates
    return {
        "parameters": sum(each.numel() for each in bench.trainer.model.parameters()),
        "interval": arguments.interval,
        "updates_of_a_stretch": updates,
        "update": update,
        "first_copy": copies[0],
        "copy": statistics.median(copies[1:]),
        "write": statistics.median(writes),
        "rounds": rounds,
        "cost": {kind: cost(rounds, kind, update, arguments.interval) for kind in KINDS[1:]},
    }


def cost(
    rounds: list[dict[str, float]], kind: str, update: float, interval: int
) -> dict[str, float]:
    """Return the cost of a checkpoint, in seconds and as a share of an interval.

    >>> rounds = [{"none": 10.0, "overlapped": 10.5}, {"none": 11.0, "overlapped": 11.25}]
    >>> cost(rounds, "overlapped", update=0.5, interval=100)
    {'seconds': 0.375, 'lowest': 0.25, 'highest': 0.5, 'share': 0.0075}
    """
    lost = [each[kind] - each["none"] for each in rounds]
    seconds = statistics.median(lost)
    share = seconds / (interval * update)
    return {"seconds": seconds, "lowest": min(lost), "highest": max(lost), "share": share}


def table(results: dict[str, object], device: torch.device) -> None:
    print(machine(device))
    print(f"{results['parameters'] / 1e6:.1f} M parameters, update {results['update']:.3f} s")  # type: ignore[operator]
    for name in ("first_copy", "copy", "write"):
        print(f"{name.replace('_', ' '):<11}{results[name]:>8.2f} s")
    print(f"{'':<11}{'s lost':>8}{'lowest':>8}{'highest':>9}{'of ' + str(results['interval']):>9}")
    for kind, lost in results["cost"].items():  # type: ignore[attr-defined]
        numbers = f"{lost['seconds']:>8.2f}{lost['lowest']:>8.2f}{lost['highest']:>9.2f}"
        print(f"{kind:<11}{numbers}{lost['share']:>9.2%}")


if __name__ == "__main__":
    main()
