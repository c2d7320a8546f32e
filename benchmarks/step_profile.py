"""The profile of a step; `profile.py` is its command and explains it.

A separate file, because importing `profile` gives Python's module of that name.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from annotated_mpnet.fast.allocator import keep_memory
from annotated_mpnet.training.throughput import training_flops
from common import machine, model_config, num_predicted, write_json
from contestants import CONTESTANTS, Setting, Step, add_flags, build, mode_of
from roofline import OTHER, PARTS, Operations, measure_bandwidth, measure_product_rate, part_of

CONVENTION = (
    "seconds per step of each operation by PyTorch's profiler, without those it calls; floor: the "
    "larger of FLOPs / product_rate and bytes / bandwidth of each operation, bytes being operands "
    "read and results written once; both rates measured on the machine"
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="profile.py")
    add_flags(parser)
    parser.add_argument("--with", dest="contestant", choices=CONTESTANTS, default="ours")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--rate-size",
        type=int,
        default=2048,
        help="size of the square product that measures the rate; the copy is 16 times as large",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    setting = Setting.of(arguments)
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    rates = (
        measure_product_rate(setting.device, dtype, arguments.rate_size),
        measure_bandwidth(setting.device, 16 * arguments.rate_size**2),
    )
    if arguments.contestant.startswith("ours") and setting.device.type == "cpu":
        keep_memory()
    step = build(arguments.contestant, setting)
    for _ in range(3):
        step()
    times = operation_times(step, arguments.steps, setting.device)
    # After timing, because counting operations switches compiled code off for good.
    with Operations() as operations:
        step()
    print(f"{arguments.contestant}, {arguments.precision}, dropout {setting.dropout}")
    print(setting.shape)
    print(machine(setting.device))
    print(f"large products {rates[0] / 1e9:,.0f} GFLOP/s, copies {rates[1] / 1e9:,.1f} GB/s")
    results = table(times, operations.floors(*rates), by_part=not setting.compile)
    shape = setting.shape
    needed = training_flops(
        model_config(shape, 0.0),
        mode_of(arguments.contestant),
        shape.batch,
        shape.length,
        num_predicted(shape.length),
    )
    print(f"products that the objective needs: {needed / rates[0]:.4f} s at this rate")
    results |= {"product_rate": rates[0], "bandwidth": rates[1], "flops_needed": needed}
    write_json("profile", arguments, setting.device, CONVENTION, results)


def operation_times(step: Step, steps: int, device: torch.device) -> dict[str, float]:
    """Return the seconds per step of each operation, without those it calls, by name."""
    activities, on_gpu = [ProfilerActivity.CPU], device.type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    # On a GPU an operation's time is that of its kernels. The profiler also lists the kernels under
    # their own names; they must not count twice.
    return {
        each.key: (each.self_device_time_total if on_gpu else each.self_cpu_time_total)
        / steps
        / 1e6
        for each in profiler.key_averages()
        if each.device_type == DeviceType.CPU
    }


def table(times: dict[str, float], floors: dict[str, float], *, by_part: bool) -> dict[str, object]:
    """Print and return the parts of a step.

    Args:
        times: seconds by operation.
        floors: seconds by part, without compilation.
        by_part: show a floor for each part. With --compile only the total has one, because a
            generated kernel does the work of several parts.
    """
    parts: dict[str, float] = defaultdict(float)
    others: dict[str, float] = {}
    for name, seconds in times.items():
        parts[part_of(name)] += seconds
        if part_of(name) == OTHER:
            others[name] = seconds
    total = sum(parts.values())
    # "Other" has no useful floor: it is views, Python and PyTorch's book-keeping.
    floors = {part: floor for part, floor in floors.items() if part != OTHER}
    known = {part: floors.get(part, 0.0) * by_part for part in parts}
    rows = {part: (parts[part], known[part]) for part in (*PARTS, OTHER) if part in parts}
    print(f"{'':<18}{'seconds':>10}{'share':>8}{'floor':>10}{'ratio':>8}")
    for part, (seconds, floor) in {**rows, "total": (total, sum(floors.values()))}.items():
        against = f"{floor:>10.4f}{seconds / floor:>8.2f}" if floor > 0 else f"{'-':>10}{'-':>8}"
        print(f"{part:<18}{seconds:>10.4f}{seconds / total:>8.1%}{against}")
    largest = sorted(others.items(), key=lambda item: -item[1])[:3]
    print("the largest operations under other:")
    for name, seconds in largest:
        print(f"  {name[:70]} {seconds:.4f}")
    return {
        "parts": {
            part: {
                "seconds": seconds,
                "share": seconds / total,
                "floor": floor or None,
                "ratio": seconds / floor if floor > 0 else None,
            }
            for part, (seconds, floor) in rows.items()
        },
        "total": {"seconds": total, "floor": sum(floors.values())},
        "operations": times,
    }
