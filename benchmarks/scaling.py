"""How time, memory and traffic grow: predictions, and measurements to check them.

    python benchmarks/scaling.py --paper                   print the tables of docs/performance.md
    python benchmarks/scaling.py [--pairs 5] [--json FILE]     measure four doublings, 2-5 minutes

**Time.** The operations of a step are known exactly (`training/throughput.py`), its memory nearly
so (`training/memory_estimate.py`). With a product rate r and a memory bandwidth b, a step takes

    seconds  =  FLOPs / r  +  (4 A + 28 W) / b         A bytes of activations, W weights

Stored activations are written once and read once, and so are their gradients. AdamW reads weight,
gradient and two moments, and writes all but the gradient, 4 bytes each. For a sequence of L tokens
of which P are predicted, forward and backward take this many operations in a layer of width D (with
F = 4 D) and in the head. (The last layer takes fewer, because it computes P queries only.)

    D^2 (72 L + 132 P)  +  12 D (L^2 + 2 P L + 2 P^2)          6 P D (D + V)

So doubling the layers or the batch doubles the work, and doubling the width takes about four
times as much. Doubling the length takes slightly more than twice, because of attention. Its share
in MPNet-base at 128, 512 and 2048 tokens:

>>> share = [attention_share(length) for length in (128, 512, 2048)]
>>> [f"{each:.0%}" for each in share]
['3%', '10%', '31%']

**Memory.** 16 bytes per weight, plus activations in proportion to layers, width and batch. They
grow with the length if attention stores no scores (a fused kernel), with its square otherwise.

**Traffic.** With DDP, each of n ranks has its own gradients, 4 bytes per weight, and needs their
mean. In a ring, each rank sends and receives 2 (n - 1) / n times that, less than twice the
gradients for any number of ranks:

>>> [round(traffic(109_518_527, ranks) / 1e9, 2) for ranks in (1, 2, 8, 1024)]      # GB
[0.0, 0.44, 0.77, 0.88]

This does not depend on the size of an update, so large updates make traffic cheap. We send
gradients once per update, not once per micro-batch (`training/distributed.py`).

**Not included.** Kernel launches, Python, waiting for data (`data.py` measures it), and the overlap
of traffic with the backward pass, which hides most of it with DDP. So small shapes are slower than
predicted, and traffic costs less.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.training.memory_estimate import BYTES_PER_WEIGHT, Workload
from annotated_mpnet.training.throughput import BF16_TFLOPS, layer_shape
from common import Shape, machine, model_config, num_predicted, write_json
from contestants import Setting, Worker, add_flags, work
from roofline import measure_bandwidth, measure_product_rate

CONVENTION = (
    "predicted and measured ratios to the base shape: of seconds per step (median over rounds of "
    "the ratio within a round) and of peak memory; predicted seconds: FLOPs / product rate + (4 "
    "activation bytes + 28 weights) / bandwidth; predicted bytes: 16 weights + activation bytes"
)

PASSES = 4
"""Each byte of stored activations is written and read, and so is its gradient."""

OPTIMIZER_BYTES = 28
"""AdamW reads four numbers of 4 bytes per weight, and writes three."""

DOUBLED = ("layers", "width", "length", "batch")

TOKENS = {"10 B": 10e9, "100 B": 100e9, "paper, 2.1 T": 500_000 * 8192 * 512.0}
MFUS = (0.25, 0.35, 0.42)
DEVICES = ("H200", "A100", "RTX 4090")
# GB/s in one direction, from data sheets.
LINKS = {"NVLink 4": 450.0, "PCIe 4.0 x 16": 32.0, "10 Gbit/s": 1.25}


@dataclass(frozen=True)
class StepCost:
    """The cost of a shape."""

    flops: float
    weights: int
    activation_bytes: float

    @classmethod
    def of(cls, work: Workload) -> "StepCost":
        """Return the cost of one step on a micro-batch."""
        return cls(work.flops(), count_weights(work.model), work.activation_bytes())

    def seconds(self, product_rate: float, bandwidth: float) -> float:
        """Return the time of a step, given the machine's FLOP/s and bytes/s."""
        moved = PASSES * self.activation_bytes + OPTIMIZER_BYTES * self.weights
        return self.flops / product_rate + moved / bandwidth

    @property
    def memory_bytes(self) -> float:
        """Weights, gradients, AdamW's moments and activations."""
        return BYTES_PER_WEIGHT * self.weights + self.activation_bytes


def count_weights(config: ModelConfig) -> int:
    """Return the number of parameters, without allocating them.

    >>> count_weights(ModelConfig())
    109518527
    """
    with torch.device("meta"):
        return sum(each.numel() for each in MPNetForPretraining(config).parameters())


def traffic(weights: int, ranks: int) -> float:
    """Return the bytes that each rank sends (and receives) per update with DDP."""
    return 4.0 * weights * 2 * (ranks - 1) / ranks


def base_sequence(length: int = 512) -> Workload:
    """Return one sequence of MPNet-base on a GPU, in bfloat16."""
    config = ModelConfig(max_positions=length)
    P = num_predicted(length)
    return Workload(config, "mpnet", 1, length, P, bf16=True, attention="sdpa", on_gpu=True)


def attention_share(length: int) -> float:
    """Return the share of MPNet-base's work in scores and weighted sums of values."""
    work, P = base_sequence(length), num_predicted(length)
    _, keys, pairs = layer_shape("mpnet", length, P)
    layers, width = work.model.encoder_layers, work.model.encoder_embed_dim
    # Two products of 2 D operations per pair; the last layer has only the P queries.
    return 3 * 4 * width * ((layers - 1) * pairs + P * keys) / work.flops()


def days(tokens: float, flops_per_second: float) -> float:
    """Return the days that one device needs to train MPNet-base on so many tokens.

    The paper's run at 35 % of an H200's peak:

    >>> round(days(TOKENS["paper, 2.1 T"], 0.35 * 989e12))
    49
    """
    return tokens / 512 * base_sequence().flops() / flops_per_second / 86_400


def growth_table() -> Iterator[str]:
    """Yield how costs grow when one thing doubles: MPNet-base, 32 x 512 tokens, 8 ranks."""
    yield "| twice | work of an update | weights | activations | memory | traffic of a rank |"
    yield "|---|---:|---:|---:|---:|---:|"
    work = replace(base_sequence(), batch_size=32)
    model, before = work.model, StepCost.of(work)
    others = {
        "layers": replace(work, model=replace(model, encoder_layers=24)),
        "width": replace(
            work,
            model=replace(
                model, encoder_embed_dim=1536, encoder_ffn_dim=6144, encoder_attention_heads=24
            ),
        ),
        "length": replace(base_sequence(1024), batch_size=32),
        "batch": replace(work, batch_size=64),
        "ranks": work,
    }
    for name, other in others.items():
        after, ranks = StepCost.of(other), 16 if name == "ranks" else 8
        ratios = (
            after.flops / before.flops * ranks / 8,
            after.weights / before.weights,
            after.activation_bytes / before.activation_bytes,
            after.memory_bytes / before.memory_bytes,
            traffic(after.weights, ranks) / traffic(before.weights, 8),
        )
        yield f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def speed_table() -> Iterator[str]:
    """Yield MPNet-base's tokens per second and day, by device and MFU."""
    yield "| device | MFU | tokens/s | tokens a day |"
    yield "|---|---:|---:|---:|"
    for device in DEVICES:
        for mfu in MFUS:
            speed = mfu * BF16_TFLOPS[device] * 1e12 / base_sequence().flops() * 512
            yield f"| {device} | {mfu:.0%} | {speed / 1e3:,.0f} k | {speed * 86_400 / 1e9:,.1f} G |"


def cost_table() -> Iterator[str]:
    """Yield the time to pretrain MPNet-base at 35 % of the peak, by number of tokens."""
    yield "| tokens | EFLOP | H200, hours | 8 x H200, hours | A100, hours | RTX 4090, days |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, tokens in TOKENS.items():
        work = tokens / 512 * base_sequence().flops()
        h200, a100, rtx = (days(tokens, 0.35 * BF16_TFLOPS[each] * 1e12) for each in DEVICES)
        yield (
            f"| {name} | {work / 1e18:,.1f} | {h200 * 24:,.1f} | {h200 * 24 / 8:,.1f} | "
            f"{a100 * 24:,.1f} | {rtx:,.1f} |"
        )


def traffic_table() -> Iterator[str]:
    """Yield the time of an update's work and traffic: MPNet-base, 8 H200 at 35 %."""
    yield (
        "| sequences per update | work, ms | " + " | ".join(f"{each}, ms" for each in LINKS) + " |"
    )
    yield "|---|---:|---:|---:|---:|"
    sent = traffic(count_weights(ModelConfig()), 8)
    for sequences in (128, 1024, 8192):
        work = sequences / 8 * base_sequence().flops() / (0.35 * BF16_TFLOPS["H200"] * 1e12)
        links = " | ".join(f"{sent / speed / 1e6:,.1f}" for speed in LINKS.values())
        yield f"| {sequences:,} | {work * 1e3:,.0f} | {links} |"


TABLES = (growth_table, speed_table, cost_table, traffic_table)


def main() -> None:
    arguments = parse()
    if arguments.paper:
        for table in TABLES:
            print("\n".join(table()), end="\n\n")
        return
    setting = Setting.of(arguments)
    if arguments.worker:
        work(arguments.worker, setting, arguments.steps)
        return
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    rates = measure_product_rate(setting.device, dtype), measure_bandwidth(setting.device)
    shapes = {"base": setting.shape} | {name: doubled(setting.shape, name) for name in DOUBLED}
    workers = {name: Worker("ours", flags_of(shape)) for name, shape in shapes.items()}
    for _ in range(arguments.pairs):
        for worker in workers.values():
            worker.take_a_turn()
    for worker in workers.values():
        worker.end()
    print(f"{arguments.precision}, dropout {setting.dropout}, {setting.shape}")
    print(machine(setting.device))
    print(f"large products {rates[0] / 1e9:,.0f} GFLOP/s, copies {rates[1] / 1e9:,.1f} GB/s")
    results = compare(setting, shapes, workers, rates)
    results |= {"product_rate": rates[0], "bandwidth": rates[1]}
    write_json("scaling", arguments, setting.device, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    # Large enough that products dominate, small enough that all five processes fit in memory.
    parser.set_defaults(shape="demo", layers=4, width=384, length=256, batch=8)
    parser.add_argument("--paper", action="store_true", help="print the predictions only")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def doubled(shape: Shape, name: str) -> Shape:
    """Return the shape with one size doubled; ffn and heads grow with the width.

    >>> doubled(Shape(3, 128, 512, 4, 8000, 32, 64), "width")
    Shape(layers=3, width=256, ffn=1024, heads=8, vocab=8000, batch=32, length=64)
    """
    names = ("width", "ffn", "heads") if name == "width" else (name,)
    return replace(shape, **{each: 2 * getattr(shape, each) for each in names})


def flags_of(shape: Shape) -> list[str]:
    """Return a worker's flags: this script's, overridden by the sizes of its shape."""
    sizes = {name: getattr(shape, name) for name in DOUBLED}
    return sys.argv[1:] + [
        each for name, size in sizes.items() for each in (f"--{name}", f"{size}")
    ]


def compare(
    setting: Setting,
    shapes: dict[str, Shape],
    workers: dict[str, Worker],
    rates: tuple[float, float],
) -> dict[str, object]:
    """Print and return the predicted and measured effect of each doubling.

    Args:
        setting: shared by all shapes.
        shapes: by the size that is doubled; the first is the base.
        workers: by the same names, with their times and memory.
        rates: the machine's FLOP/s and bytes/s.
    """
    costs = {name: StepCost.of(_workload(setting, shape)) for name, shape in shapes.items()}
    base, first = costs["base"], workers["base"]
    head = ("work", "time: predicted", "measured", "memory: predicted", "measured")
    widths = (8, 17, 10, 19, 10)
    print(f"{'twice':<8}" + "".join(f"{each:>{w}}" for each, w in zip(head, widths, strict=True)))
    results: dict[str, object] = {}
    for name, cost in costs.items():
        worker = workers[name]
        ratios = [a / b for a, b in zip(worker.seconds, first.seconds, strict=True)]
        row = {
            "work": cost.flops / base.flops,
            "time_predicted": cost.seconds(*rates) / base.seconds(*rates),
            "time_measured": statistics.median(ratios),
            "memory_predicted": cost.memory_bytes / base.memory_bytes,
            "memory_measured": worker.memory_gb / first.memory_gb,
        }
        cells = zip(row.values(), widths, strict=True)
        print(f"{name:<8}" + "".join(f"{value:>{width}.2f}" for value, width in cells))
        results[name] = {
            "shape": asdict(shapes[name]),
            "seconds": worker.seconds,
            "seconds_predicted": cost.seconds(*rates),
            "memory_gb": worker.memory_gb,
            "memory_gb_predicted": cost.memory_bytes / 1e9,
            **row,
        }
    print(
        f"base shape: {statistics.median(first.seconds):.3f} s per step, predicted "
        f"{base.seconds(*rates):.3f} s; {first.memory_gb:.2f} GB, predicted "
        f"{base.memory_bytes / 1e9:.2f} GB"
    )
    return results


def _workload(setting: Setting, shape: Shape) -> Workload:
    on_gpu = setting.device.type == "cuda"
    return Workload(
        model_config(shape, setting.dropout), "mpnet", shape.batch, shape.length,
        num_predicted(shape.length), bf16=setting.bf16, on_gpu=on_gpu,
        attention="sdpa" if on_gpu else "blocked",
    )  # fmt: skip


if __name__ == "__main__":
    main()
