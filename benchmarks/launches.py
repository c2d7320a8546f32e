"""What an update asks of the CPU: the operators it starts, and how long that takes without a GPU.

    python benchmarks/launches.py [--shape base] [--attention triton] [--json FILE]

A GPU works through its kernels faster than PyTorch can start them, if the network is small enough.
Here an update of one micro-batch runs on PyTorch's `meta` device, whose tensors have shapes but no
numbers: nothing is computed, and what is left is the work of finding and starting. Operators are
not kernels (a view starts none, some start several), but each costs the CPU about the same. Works
on any machine.

    written    kernel by kernel
    recorded   with the micro-batch as a CUDA graph, whose replay starts nothing again
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.fast.recording import RecordedStep
from annotated_mpnet.mpnet import loop
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from common import SHAPES, machine, make_batch, model_config, write_json

CONVENTION = (
    "operators that PyTorch dispatches in an update of one micro-batch, on the meta device; "
    "milliseconds of the same without counting, median"
)


class Operators(TorchDispatchMode):
    """Counts what is dispatched within the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--attention", choices=ATTENTIONS, default="triton")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    print(f"{arguments.shape}, {arguments.attention}, dropout {arguments.dropout}")
    print(machine(torch.device("cpu")))
    print(f"{'':<10}{'operators':>10}{'not views':>10}{'ms':>8}")
    results = {}
    for name in ("written", "recorded"):
        step = meta_update(arguments, recorded=name == "recorded")
        step()
        with Operators() as operators:
            step()
        seconds = []
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        total, views = operators.counts.total(), count_views(operators.counts)
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"{name:<10}{total:>10,}{total - views:>10,}{milliseconds:>8.1f}")
        results[name] = {
            "operators": total,
            "not_views": total - views,
            "seconds": seconds,
            "by_name": dict(operators.counts.most_common()),
        }
    write_json("launches", arguments, torch.device("cpu"), CONVENTION, results)


def meta_update(arguments: argparse.Namespace, *, recorded: bool) -> Callable[[], object]:
    """Return an update of one micro-batch, without numbers."""
    shape, meta = SHAPES[arguments.shape], torch.device("meta")
    batch = make_batch(shape, 2).to(meta)
    with meta:
        model = MPNetForPretraining(model_config(shape, arguments.dropout))
    model.use_attention(ATTENTIONS[arguments.attention])
    optimization = OptimizationConfig()
    setup = loop.Setup(
        loop.Network(model, meta),
        build_optimizer(model, optimization, meta),
        optimization,
        check_finite=lambda *_: None,  # there is no number to look at
        add_gradient=RecordedStep(2, shape.length, once) if recorded else loop.add_gradient,
    )
    return lambda: loop.update(setup, 0, [batch])


def once(
    work: Callable[[], torch.Tensor], _: torch.device
) -> tuple[Callable[[], None], torch.Tensor]:
    """Record as a GPU would, and replay nothing: its kernels are not the CPU's work."""
    return lambda: None, work()


def count_views(counts: Mapping[str, int]) -> int:
    """Return how many operators only look at a tensor in another way."""
    kinds = ("view", "expand", "transpose", "slice", "split", "permute", "select", "t", "detach")
    kinds += ("unsqueeze", "as_strided", "alias", "_unsafe_view", "_reshape_alias", "chunk")
    return sum(count for name, count in counts.items() if name.split(".")[1] in kinds)


if __name__ == "__main__":
    main()
