"""Compare the attention implementations: time, memory, accuracy, reproducibility.

    python benchmarks/attention.py [--with eager sdpa blocked triton] [--shape base] [--batch 32]

One layer's attention on full sequences, forward and backward: the masked sentence and the
staircase. It starts from queries, keys and values, so projections are not timed. The
implementations run in turn; a ratio is the median over rounds of the ratio within a round.

    eager     the formula, step by step; the reference
    sdpa      PyTorch's scaled_dot_product_attention with a bias matrix
    blocked   one sample at a time, for CPUs
    triton    our kernels, for GPUs

Building the bias is not timed, because a batch builds it once for all layers. Reading it and
computing its gradient are.

`off by` is the largest relative error (in norm) of the output and all gradients, compared with the
formula in float32 without dropout. `same bits` says whether two runs gave identical results.
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
    "seconds of one layer's attention, forward and backward, on one micro-batch of full sequences, "
    "without projections and without building the bias"
)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    layer = Layer(arguments, device)
    exact = Layer(arguments, device, torch.float32, dropout=0.0)
    reference = exact.run(ATTENTIONS["eager"])
    without_dropout = Layer(arguments, device, dropout=0.0)
    contestants = {name: ATTENTIONS[name] for name in arguments.contestants}
    agreements = {
        name: agreement(without_dropout, each, reference) for name, each in contestants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    steps = {name: layer.prepared(each) for name, each in contestants.items()}
    for step in steps.values():  # warm up: compile kernels, allocate memory
        step()
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(timed(step, device))
            memory[name] = memory_peak(device)
    results = show(layer, arguments, seconds, memory, agreements)
    write_json("attention", arguments, device, CONVENTION, results)


def show(
    layer: "Layer",
    arguments: argparse.Namespace,
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    agreements: dict[str, tuple[float, bool]],
) -> dict[str, object]:
    """Print the table and return its numbers."""
    B, L, H = layer.batch_size, layer.length, layer.config.encoder_attention_heads
    print(f"{B} x {L} tokens, {num_predicted(L)} of each sequence predicted, {H} heads")
    print(f"{arguments.precision}, dropout {arguments.dropout}")
    print(machine(layer.table.weight.device))
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
    parser.add_argument("--batch", type=int, help="sequences; default: the shape's")
    parser.add_argument("--length", type=int, help="tokens per sequence; default: the shape's")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16" if on_gpu else "fp32"
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Layer:
    """What one layer's attention computes with: queries, keys, values, blocks, bias table."""

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
        # Drawn in float32 on the CPU, so every precision and device rounds the same numbers. Laid
        # out as in the network: heads next to each other, keys and values halves of one tensor.
        query = torch.randn(self.batch_size, entries.input_ids.shape[1], shape.width)
        key_value = torch.randn(self.batch_size, num_keys, 2 * shape.width)
        self.leaves = [each.to(device, dtype).requires_grad_() for each in (query, key_value)]
        self.heads = [
            each.unflatten(2, (shape.heads, -1)).transpose(1, 2)
            for each in (self.leaves[0], *self.leaves[1].chunk(2, dim=2))
        ]

    def prepared(self, attention: Attention) -> Callable[[], list[torch.Tensor]]:
        """Build the bias; return a function that computes the output and all gradients."""
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
            output = attention.attend(*self.heads, tuple(blocks), self.dropout)
            # A different output gradient for each element, so that no mistake cancels out.
            gradient = torch.linspace(-1, 1, output.numel(), device=output.device)
            gradient = gradient.view_as(output).to(output.dtype)
            gradients = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
            return [output.detach(), *gradients]

        return step

    def run(self, attention: Attention) -> list[torch.Tensor]:
        """Return the output and the gradients of queries, keys and values, and the bias table."""
        return self.prepared(attention)()


def agreement(
    layer: Layer, attention: Attention, reference: list[torch.Tensor]
) -> tuple[float, bool]:
    """Return the largest relative error, and whether a second run gives the same bits."""
    found, again = (layer.run(attention) for _ in range(2))
    off_by = max(
        ((one.float() - other).norm() / other.norm()).item()
        for one, other in zip(found, reference, strict=True)
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
