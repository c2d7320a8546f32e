"""The ways to compute attention, side by side: time, memory, agreement, the same bits or not.

    python benchmarks/attention.py [--with eager sdpa blocked triton] [--shape base] [--batch 32]

The attention of one layer on full sequences, forward and backward: the masked sentence, and the
staircase of content and queries. Queries, keys and values are given, so no projection is in it. The
ways take turns, and a ratio is the median of those of the same round.

    eager     the formula, step by step: what the others are compared with
    sdpa      PyTorch's scaled_dot_product_attention, with a matrix of biases
    blocked   sample by sample, for CPUs
    triton    our kernels, for GPUs

The bias is built once for a batch and used by all layers, so it is not timed; each layer pays for
reading it, and for its gradient.

`off by` is the largest relative difference in norm, over the results and all gradients, from the
formula in float32 (without dropout). `same bits`: whether all came out alike twice.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.mpnet.attention import Attention, BiasedBlock
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.positions import RelativePositionBias
from annotated_mpnet.mpnet.two_stream import mpnet_entries
from annotated_mpnet.training.throughput import memory_peak
from common import SHAPES, machine, make_batch, num_predicted, write_json

CONVENTION = (
    "seconds of one layer's attention, forward and backward, on one micro-batch of full sequences; "
    "without projections and without building the bias"
)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    work = Work(arguments, device)
    exact = Work(arguments, device, torch.float32, dropout=0.0)
    truth = exact.run(ATTENTIONS["eager"])
    plain = Work(arguments, device, dropout=0.0)
    contestants = {name: ATTENTIONS[name] for name in arguments.contestants}
    agreements = {name: agreement(plain, each, truth) for name, each in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    steps = {name: work.prepared(each) for name, each in contestants.items()}
    for step in steps.values():  # kernels are compiled, and memory is asked for
        step()
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(timed(step, device))
            memory[name] = memory_peak(device)
    results = show(work, arguments, seconds, memory, agreements)
    write_json("attention", arguments, device, CONVENTION, results)


def show(
    work: "Work",
    arguments: argparse.Namespace,
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    agreements: dict[str, tuple[float, bool]],
) -> dict[str, object]:
    """Print the table, and return what is in it."""
    B, L, H = work.batch_size, work.length, work.config.encoder_attention_heads
    print(f"{B} x {L} tokens, {num_predicted(L)} of each sequence predicted, {H} heads")
    print(f"{arguments.precision}, dropout {arguments.dropout}")
    print(machine(work.table.weight.device))
    print(f"{'':<16}{'ms':>10}{'ratio':>8}{'GB':>8}{'off by':>10}  same bits")
    first = next(iter(seconds.values()))
    results: dict[str, object] = {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
        off_by, same = agreements[name]
        print(
            f"{name:<16}{1e3 * statistics.median(times):>10.3f}{ratio:>7.2f}x"
            f"{memory[name]:>8.2f}{off_by:>10.1e}  {'yes' if same else 'no'}"
        )
        results[name] = {
            "seconds": times, "ratio_to_first": ratio, "memory_gb": memory[name],
            "off_by": off_by, "same_bits": same,
        }  # fmt: skip
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    usual = ["eager", "sdpa", "triton" if on_gpu else "blocked"]
    parser.add_argument("--with", dest="contestants", nargs="+", choices=ATTENTIONS, default=usual)
    parser.add_argument("--shape", choices=SHAPES, default="base" if on_gpu else "base4")
    parser.add_argument("--batch", type=int, help="sequences, instead of the shape's")
    parser.add_argument("--length", type=int, help="tokens, instead of the shape's")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16" if on_gpu else "fp32"
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Work:
    """A layer's queries, keys and values, its two blocks, and the table of biases."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        device: torch.device,
        dtype: torch.dtype | None = None,
        dropout: float | None = None,
    ) -> None:
        shape = SHAPES[arguments.shape]
        self.batch_size = arguments.batch or shape.batch
        self.length = arguments.length or shape.length
        self.dropout = arguments.dropout if dropout is None else dropout
        dtype = dtype or (torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
        self.config = ModelConfig(
            encoder_embed_dim=shape.width, encoder_attention_heads=shape.heads
        )
        sizes = type(shape)(**{**vars(shape), "length": self.length})
        batch = make_batch(sizes, self.batch_size).to(device)
        entries = mpnet_entries(
            batch.input_ids, batch.predicted_positions, batch.predicted_ids, None
        )
        self.blocks = entries.blocks
        self.table = RelativePositionBias(self.config).to(device)
        torch.manual_seed(0)
        torch.nn.init.normal_(self.table.weight)
        num_keys = entries.last_block.key_positions.shape[1]
        # Drawn on the CPU and in float32, so that the same numbers are rounded to either type.
        # As in the network: heads side by side, keys and values halves of one tensor.
        query = torch.randn(self.batch_size, entries.input_ids.shape[1], shape.width)
        key_value = torch.randn(self.batch_size, num_keys, 2 * shape.width)
        self.leaves = [each.to(device, dtype).requires_grad_() for each in (query, key_value)]
        self.heads = [
            each.unflatten(2, (shape.heads, -1)).transpose(1, 2)
            for each in (self.leaves[0], *self.leaves[1].chunk(2, dim=2))
        ]

    def prepared(self, attention: Attention) -> Callable[[], list[torch.Tensor]]:
        """Build the bias, and return what computes the rest: the result and all gradients."""
        dtype = self.heads[0].dtype
        blocks = []
        for block in self.blocks:
            bias = attention.make_bias(block, self.table, self.heads[0])
            bias = bias.to(dtype) if isinstance(bias, torch.Tensor) else bias
            sizes = block.query_positions.shape[1], block.key_positions.shape[1]
            blocks.append(BiasedBlock(*sizes, bias))
        leaves = [*self.leaves, self.table.weight]

        def step() -> list[torch.Tensor]:
            torch.manual_seed(1)
            result = attention.attend(*self.heads, tuple(blocks), self.dropout)
            # Each number a weight of its own, as large as those of a loss.
            wanted = torch.linspace(-1, 1, result.numel(), device=result.device)
            wanted = wanted.view_as(result).to(result.dtype)
            gradients = torch.autograd.grad(result, leaves, wanted, retain_graph=True)
            return [result.detach(), *gradients]

        return step

    def run(self, attention: Attention) -> list[torch.Tensor]:
        """Return the result, and the gradients of the projections and of the table."""
        return self.prepared(attention)()


def agreement(work: Work, attention: Attention, truth: list[torch.Tensor]) -> tuple[float, bool]:
    """Return how far off the formula's results in float32 it is, and whether it repeats itself."""
    found, again = (work.run(attention) for _ in range(2))
    off_by = max(
        ((one.float() - other).norm() / other.norm()).item()
        for one, other in zip(found, truth, strict=True)
    )
    return off_by, all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
