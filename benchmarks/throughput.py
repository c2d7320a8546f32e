"""One training step, ours beside others: tokens per second, memory, MFU.

    python benchmarks/throughput.py [--shape base4|demo|base] [--dropout 0.1]
            [--precision fp32|bf16] [--with ours permuted hf ours-mlm] [--pairs 7] [--json FILE]

Who takes part, and what a step is, stands in `contestants.py`. Each runs in a process of its own,
as its user would start it, and they take turns: A B C A B C. The ratios are those of the same
round, so that what else the machine does in the meantime hits all of them alike, and the median of
the ratios is what can be repeated. `--same-allocator` gives all of them the memory that ours keeps
(`fast/allocator.py`).

Convention: tokens are input tokens without padding; MFU is what `training/throughput.py` says, on a
GPU whose peak is known. Memory is the most that a process took above what it had before the network
was built; on CUDA, the most that tensors took.
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
    "a step is forward, backward and AdamW on one micro-batch of full rows; tokens are input "
    "tokens without padding; ratio is the median of the ratios to the first of the same round; "
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
    parser.add_argument("--steps", type=int, default=1, help="steps of a contestant in a round")
    parser.add_argument("--same-allocator", action="store_true", help="for all, not for ours only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def table(setting: Setting, workers: dict[str, Worker]) -> dict[str, object]:
    """Print the table, and return what is in it."""
    shape = setting.shape
    rows, P = shape.batch, num_predicted(shape.length)
    peak = peak_flops(device_name(setting.device), setting.bf16)
    print(f"{rows} x {shape.length} tokens, {P} of each row predicted")
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
        flops = training_flops(model_config(shape, 0.0), mode_of(name), rows, shape.length, P)
        mfu = None if peak is None else flops / median / peak
        results[name] = {
            "seconds": worker.seconds, "median": median, "ratio_to_first": ratio, "mfu": mfu,
            "tokens_per_second": rows * shape.length / median,
            "predicted_per_second": rows * P / median, "memory_gb": worker.memory_gb,
        }  # fmt: skip
        print(
            f"{name:<10}{median:>9.4f}{rows * shape.length / median:>10,.0f}"
            f"{rows * P / median:>12,.0f}{'' if mfu is None else f'{mfu:.1%}':>7}"
            f"{worker.memory_gb:>7.2f}{ratio:>7.2f}x"
        )
    return results


if __name__ == "__main__":
    main()
