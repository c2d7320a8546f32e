"""What an update costs the CPU of a GPU machine: operators dispatched, and the time for that.

    python benchmarks/launches.py [--shape base] [--attention triton] [--json FILE]

With a small enough network, a GPU runs its kernels faster than PyTorch can launch them. Here an
update of one micro-batch runs on PyTorch's `meta` device, whose tensors have shapes but no data.
Nothing is computed, so the time is the overhead of dispatching. An operator is not a kernel (a view
launches none, some operators launch several), but each costs the CPU about the same. Needs no GPU.

    written    one operator at a time, as the code is written
    recorded   the micro-batch as a CUDA graph, whose replay dispatches nothing
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
    "operators that PyTorch dispatches in an update of one micro-batch on the meta device; median "
    "milliseconds of the same update without counting"
)


class Operators(TorchDispatchMode):
    """Counts, by name, the operators dispatched in a `with` block."""

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
    print(f"{'':<10}{'operators':>10}{'no views':>10}{'ms':>8}")
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
    """Return an update of one micro-batch on the meta device."""
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
        check_finite=lambda *_: None,  # meta tensors have no values to check
        add_gradient=RecordedStep(2, shape.length, once) if recorded else loop.add_gradient,
    )
    return lambda: loop.update(setup, 0, [batch])


def once(
    work: Callable[[], torch.Tensor], _: torch.device
) -> tuple[Callable[[], None], torch.Tensor]:
    """Record as on a GPU; the replay costs the CPU nothing."""
    return lambda: None, work()


def count_views(counts: Mapping[str, int]) -> int:
    """Count the operators that only make a view of a tensor."""
    kinds = ("view", "expand", "transpose", "slice", "split", "permute", "select", "t", "detach")
    kinds += ("unsqueeze", "as_strided", "alias", "_unsafe_view", "_reshape_alias", "chunk")
    return sum(count for name, count in counts.items() if name.split(".")[1] in kinds)


if __name__ == "__main__":
    main()
