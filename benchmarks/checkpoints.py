"""What a checkpoint costs the training that goes on beside it.

    python benchmarks/checkpoints.py [--shape base] [--rows 1] [--length 128] [--rounds 5]
            [--interval 100] [--directory PATH] [--json FILE]

Real updates of a real network, MPNet-base with AdamW, by the loop's own `Trainer.update`, and
checkpoints by its own `Saver` (`checkpoints/saving.py`). Three stretches of as many updates take
turns, A B C A B C:

    none      no checkpoint
    waiting   one at the beginning, which the loop waits for until it is on the disk
    beside    one at the beginning, written while the updates are made

What a checkpoint costs is what its stretch took longer than the one without, in the same round, as
a median over rounds; in percent, of `--interval` updates. A stretch is long enough for the whole
write: if it was not, the rest of the write is part of its time.

The update is small (by default one row of 128 tokens), so that a stretch takes seconds and not
minutes on a CPU. What a checkpoint costs in seconds depends little on that, so its share of larger
updates is smaller.

The copy is timed apart, the first one (into new memory) and later ones, and so is the write with
nothing beside it: files, hashes, fsync, rename.
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
    "seconds of a stretch of updates with a checkpoint less those of one without, of the same "
    "round; median over rounds; share of `interval` updates"
)
STRETCHES = ("none", "waiting", "beside")
START = TrainState(update=0, tokens_seen=0, predicted_seen=0, best_valid_bits=None, identity={})


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_memory()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        run = RunConfig(checkpoint_dir=Path(folder) / "run", keep_checkpoints=1)
        trainer, batch = build(arguments, device)
        # In the directory's lock, as in a run; nothing else is written there.
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
    parser.add_argument("--rows", type=int, default=1, help="of an update")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interval", type=int, default=100, help="updates between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, help="on the disk to write to; else temporary")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def build(arguments: argparse.Namespace, device: torch.device) -> tuple[Trainer, Batch]:
    """Return a trainer of a shape's network, and the batch that it makes its updates of."""
    shape = replace(SHAPES[arguments.shape], length=arguments.length)
    optimization = OptimizationConfig(total_updates=10**6, lr=1e-5)
    model = MPNetForPretraining(model_config(shape, dropout=0.1))
    model.use_attention(ATTENTIONS[choose_attention("auto", device)[0]])
    network = SharedNetwork(model, World(), device)
    optimizer = build_optimizer(model, optimization, device)
    bf16 = device.type == "cuda"
    trainer = Trainer(network, optimizer, optimization, "mpnet", 12345, bf16, Tracker.silent())
    return trainer, make_batch(shape, arguments.rows)


@dataclass
class Bench:
    """Updates and checkpoints, by the clock."""

    trainer: Trainer
    saver: Saver
    batch: Batch
    update: int = 0

    def updates(self, number: int) -> None:
        """Make so many updates, to their end."""
        for _ in range(number):
            self.trainer.update(self.update, [self.batch])
            self.update += 1
        self.trainer.catch_up()

    def save(self) -> None:
        """Begin a checkpoint of where it stands; returns when the copy is made."""
        state = replace(START, update=self.update)
        self.saver.save(checkpoint_name(self.update), state, None)

    def stretch(self, kind: str, number: int) -> float:
        """Return the seconds of so many updates, with a checkpoint of a kind."""

        def work() -> None:
            if kind != "none":
                self.save()
            if kind == "waiting":
                self.saver.finish()
            self.updates(number)
            self.saver.finish()

        return timed(work)


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(arguments: argparse.Namespace, bench: Bench) -> dict[str, object]:
    """Return everything that is measured, in seconds."""
    bench.updates(3)
    update = timed(lambda: bench.updates(3)) / 3
    copies, writes = [], []
    for _ in range(3):
        bench.updates(1)
        copies.append(timed(bench.save))
        writes.append(timed(bench.saver.finish))
    # Twice as long as the write with nothing beside it.
    number = max(3, round(2 * statistics.median(writes) / update))
    print(
        f"update {update:.3f} s, write {statistics.median(writes):.2f} s, copy {copies[-1]:.2f} s"
    )
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({kind: bench.stretch(kind, number) for kind in STRETCHES})
        print("  ".join(f"{kind} {seconds:.2f} s" for kind, seconds in rounds[-1].items()))
    update = statistics.median(each["none"] for each in rounds) / number
    return {
        "parameters": sum(each.numel() for each in bench.trainer.model.parameters()),
        "interval": arguments.interval,
        "updates_of_a_stretch": number,
        "update": update,
        "first_copy": copies[0],
        "copy": statistics.median(copies[1:]),
        "write": statistics.median(writes),
        "rounds": rounds,
        "cost": {kind: cost(rounds, kind, update, arguments.interval) for kind in STRETCHES[1:]},
    }


def cost(
    rounds: list[dict[str, float]], kind: str, update: float, interval: int
) -> dict[str, float]:
    """Return what a checkpoint of a kind costs.

    >>> rounds = [{"none": 10.0, "beside": 10.5}, {"none": 11.0, "beside": 11.25}]
    >>> cost(rounds, "beside", update=0.5, interval=100)
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
