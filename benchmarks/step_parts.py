"""Where the time of a training step goes, part by part.

    python benchmarks/step_parts.py [--shape base4|demo|base] [--dropout 0.1]
            [--precision fp32|bf16] [--with ours|permuted|hf|ours-mlm] [--steps 3] [--json FILE]

PyTorch's profiler gives the time that each operation took by itself, without those that it called;
here they are added up in parts that have a name. The first line, products, is the floor: the work
that the objective asks for. Everything else moves numbers about. What stands under "other" is shown
by name, so that no part hides there.

The profiler itself takes some time: shares are right, the sum is a little too large. (The name of
this file is not `profile`, because a file of that name would hide Python's own module from all that
lie beside it.)
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from annotated_mpnet.training.allocator import keep_memory
from throughput import SHAPES, build, machine

# The first that fits counts; names are those of PyTorch's operations, or of CUDA's kernels.
PARTS = {
    "products": r"aten::(add|baddb|b)?mm$|gemm|cutlass|nvjet|aten::linear",
    "fused attention": r"attention|flash|fmha",
    "softmax": r"softmax",
    "random numbers": r"randint|random|bernoulli|dropout|philox",
    "norms": r"layer_norm",
    "non-linearity": r"gelu|relu|tanh|silu",
    "optimizer": r"adam|zero_grad",
    "embeddings": r"embedding|index|gather|scatter",
    "copies": r"copy|contiguous|clone|cat|fill|zero_|empty|memcpy|memset",
    "sums, products by element": r"aten::(add|mul|sub|div|sum|ge|where|masked)|elementwise|reduce",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="base4")
    parser.add_argument("--batch", type=int, help="rows, instead of the shape's")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--with", dest="worker", default="ours", help="as in throughput.py")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    if arguments.worker.startswith("ours") and device.type == "cpu":
        keep_memory()
    step = build(arguments)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(arguments.steps):
            step()
    # Microseconds of each operation by itself: on a GPU those of its kernels.
    on_gpu = device.type == "cuda"
    times = {
        each.key: (each.self_device_time_total if on_gpu else each.self_cpu_time_total)
        / arguments.steps
        / 1e6
        for each in profiler.key_averages()
    }
    report = show(times, f"{arguments.worker}, {arguments.shape}, {arguments.precision}, dropout "
                  f"{arguments.dropout}; {machine(device)}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(times: dict[str, float], title: str) -> dict[str, float]:
    """Print the parts of a step, and return their seconds."""
    parts: dict[str, float] = defaultdict(float)
    others: dict[str, float] = {}
    for name, seconds in times.items():
        part = part_of(name)
        parts[part] += seconds
        if part == "other":
            others[name] = seconds
    total = sum(parts.values())
    print(title)
    for part in (*PARTS, "other"):
        if part in parts:
            print(f"{part:<28}{parts[part]:>9.4f} s{parts[part] / total:>7.1%}")
    print(f"{'together':<28}{total:>9.4f} s")
    largest = sorted(others.items(), key=lambda item: -item[1])[:5]
    print("other:", ", ".join(f"{name} {seconds:.4f}" for name, seconds in largest))
    return {**parts, "total": total}


def part_of(name: str) -> str:
    """Return the part to which an operation belongs."""
    for part, pattern in PARTS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return "other"


if __name__ == "__main__":
    main()
