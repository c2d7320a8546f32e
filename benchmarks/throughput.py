"""One training step, ours compared with others: tokens per second, memory, MFU.

    python benchmarks/throughput.py [--shape base4|demo|base] [--dropout 0.1]
            [--precision fp32|bf16] [--with ours permuted hf ours-mlm] [--pairs 7] [--json FILE]

`contestants.py` describes the contestants and what a step is. Each runs in its own process, and
they run in turn: A B C A B C. A ratio is the median over rounds of the ratio within a round, so
other work on the machine affects all contestants alike. `--same-allocator` gives our allocator
setting (`fast/allocator.py`) to all of them.

Convention: tokens are input tokens without padding; MFU is defined in `training/throughput.py`, and
shown for GPUs whose peak is known. Memory is the peak of the process above what it used before the
network was built; on CUDA, the peak of tensors.
"""

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from annotated_mpnet.training.throughput import device_name, peak_flops, training_flops
from common import machine, model_config, num_predicted, write_json
from contestants import CONTESTANTS, Setting, Worker, add_flags, mode_of, work

CONVENTION = (
    "a step is forward, backward and AdamW on one micro-batch of full sequences; tokens are input "
    "tokens without padding; ratio: to the first contestant within a round, median over rounds; "
    "MFU by annotated_mpnet/training/throughput.py; memory above that before the network was built"
)


def main() -> None:
    arguments = parse()
    setting = Setting.of(arguments)
    if arguments.worker:
        work(arguments.worker, setting, arguments.steps, arguments.same_allocator)
        return
    workers = {name: Worker(name, sys.argv[1:]) for name in arguments.contestants}
    for _ in range(arguments.pairs):
        for worker in workers.values():
            worker.take_a_turn()
    for worker in workers.values():
        worker.end()
    results = table(setting, workers)
    write_json("throughput", arguments, setting.device, CONVENTION, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument(
        "--with", dest="contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS
    )
    parser.add_argument("--pairs", type=int, default=7, help="rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps per contestant and round")
    parser.add_argument(
        "--same-allocator", action="store_true", help="our allocator setting for all"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def table(setting: Setting, workers: dict[str, Worker]) -> dict[str, object]:
    """Print the table and return its numbers."""
    shape = setting.shape
    B, P = shape.batch, num_predicted(shape.length)
    peak = peak_flops(device_name(setting.device), setting.bf16)
    print(f"{B} x {shape.length} tokens, {P} of each sequence predicted")
    print(shape)
    precision = "bfloat16" if setting.bf16 else "float32"
    print(f"{precision}, dropout {setting.dropout}")
    print(machine(setting.device))
    print(
        f"{'':<10}{'s/step':>9}{'tokens/s':>10}{'predicted/s':>12}{'MFU':>7}{'GB':>7}{'ratio':>8}"
    )
    results: dict[str, object] = {"shape": asdict(shape)}
    first = next(iter(workers.values())).seconds
    for name, worker in workers.items():
        median = statistics.median(worker.seconds)
        ratio = statistics.median(a / b for a, b in zip(worker.seconds, first, strict=True))
        flops = training_flops(model_config(shape, 0.0), mode_of(name), B, shape.length, P)
        mfu = None if peak is None else flops / median / peak
        results[name] = {
            "seconds": worker.seconds, "median": median, "ratio_to_first": ratio, "mfu": mfu,
            "tokens_per_second": B * shape.length / median,
            "predicted_per_second": B * P / median, "memory_gb": worker.memory_gb,
        }  # fmt: skip
        print(
            f"{name:<10}{median:>9.4f}{B * shape.length / median:>10,.0f}"
            f"{B * P / median:>12,.0f}{'' if mfu is None else f'{mfu:.1%}':>7}"
            f"{worker.memory_gb:>7.2f}{ratio:>7.2f}x"
        )
    return results


if __name__ == "__main__":
    main()
