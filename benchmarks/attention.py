"""The ways to compute attention, side by side: time, memory, agreement, the same bits or not.

    python benchmarks/attention.py [--with eager sdpa triton flex] [--tiles 64x64 128x64] ...

One layer of MPNet's attention on full rows: the dense block of the masked sentence and the
staircase of content and query rows, forward and back, with the gradient of the bias; queries, keys
and values are given, so that no projection is in it. The ways take turns, and a ratio is that of
the same round (median).

    eager     the formula, line by line: what the others are compared with
    sdpa      PyTorch's scaled_dot_product_attention, with a matrix of biases
    blocked   sample by sample, for CPUs
    triton    our kernels; `--tiles` gives a contestant for each size (rows x keys of a tile)
    flex      PyTorch's FlexAttention, compiled, with the same rules in its `score_mod`; CUDA only,
              as it has no backward pass on a CPU, and without dropout, which it does not have

The matrix of biases is built once a batch and used by all layers, and so is its gradient sent on to
the table. Neither is timed: what each layer pays is to read it, and to write its gradient.

`off by` is the largest relative difference in norm, over results and gradients, from the formula in
float32 (without dropout). `same bits`: whether the gradient of the table came out alike twice.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from annotated_mpnet.fast import triton_attention
from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.fast.triton_attention import Tiles, attend_triton, bias_rule, bias_steps
from annotated_mpnet.mpnet.attention import bias_matrix
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.positions import RelativePositionBias
from annotated_mpnet.mpnet.two_stream import Block, mpnet_entries
from annotated_mpnet.training.throughput import memory_peak
from common import SHAPES, machine, make_batch, num_predicted, write_json

Tensors = list[torch.Tensor]
CONVENTION = (
    "seconds of one layer's attention, forward and backward, on one micro-batch of full rows; "
    "without projections and without building the bias"
)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    work = Work(arguments, device)
    contestants = {name: attend_of(name) for name in names_of(arguments)}
    exact = Work(arguments, device, torch.float32, dropout=0.0)
    truth = exact.with_table(exact.run(attend_of("eager")))
    agreements = {
        name: agreement(arguments, device, each, truth) for name, each in contestants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    for attend in contestants.values():  # kernels are compiled, and memory is asked for
        work.run(attend)
    for _ in range(arguments.pairs):
        for name, attend in contestants.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(timed(lambda attend=attend: work.run(attend), device))
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
    print(f"{B} x {L} tokens, {num_predicted(L)} of each row predicted, {H} heads")
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
    usual = ["eager", "sdpa", "triton", "flex"] if on_gpu else ["eager", "sdpa", "blocked"]
    parser.add_argument("--with", dest="contestants", nargs="+", default=usual)
    parser.add_argument("--tiles", nargs="+", default=["x".join(map(str, Tiles()))])
    parser.add_argument("--shape", choices=SHAPES, default="base" if on_gpu else "base4")
    parser.add_argument("--batch", type=int, help="rows, instead of the shape's")
    parser.add_argument("--length", type=int, help="tokens, instead of the shape's")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16" if on_gpu else "fp32"
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--pairs", type=int, default=20, help="rounds")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def names_of(arguments: argparse.Namespace) -> list[str]:
    """Return the contestants, `triton` once for each size of tiles."""
    names = []
    for name in arguments.contestants:
        names += [f"triton {tiles}" for tiles in arguments.tiles] if name == "triton" else [name]
    return names


class Work:
    """A layer's queries, keys and values, and its two blocks, in both forms of the bias."""

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
        rows = mpnet_entries(batch.input_ids, batch.predicted_positions, batch.predicted_ids, None)
        self.table = RelativePositionBias(self.config).to(device)
        torch.manual_seed(0)
        torch.nn.init.normal_(self.table.weight)
        heads, head_dim = shape.heads, shape.width // shape.heads
        num_keys = rows.last_block.key_positions.shape[1]
        counts = rows.input_ids.shape[1], num_keys, num_keys
        # Drawn on the CPU and in float32, so that the same numbers are rounded to either type.
        self.leaves = [
            torch.randn(self.batch_size, count, heads, head_dim).to(device, dtype).requires_grad_()
            for count in counts
        ]
        self.blocks = rows.blocks
        query = self.leaves[0]
        with torch.no_grad():
            self.dense = [bias_matrix(block, self.table, query) for block in self.blocks]
        self.dtype = dtype

    def run(self, attend: "Attend") -> Tensors:
        """Go forward and back; return results, gradients of Q, K and V, and of each bias."""
        query, key, value = (each.transpose(1, 2) for each in self.leaves)
        torch.manual_seed(1)
        attended, biases = [], []
        queries = query.split([block.query_positions.shape[1] for block in self.blocks], dim=2)
        for part, block, dense in zip(queries, self.blocks, self.dense, strict=True):
            M = block.key_positions.shape[1]
            out, bias = attend(self, block, dense, (part, key[:, :, :M], value[:, :, :M]))
            attended.append(out)
            biases.append(bias)
        results = torch.cat(attended, dim=2)
        # Each number a weight of its own, as large as those of a loss.
        wanted = torch.linspace(-1, 1, results.numel(), device=results.device).view_as(results)
        gradients = torch.autograd.grad(results, [*self.leaves, *biases], wanted.to(results.dtype))
        return [results.detach(), *gradients]

    def with_table(self, results: Tensors) -> Tensors:
        """Replace the gradients of the biases by that of the table, which they all end in."""
        total = torch.zeros_like(self.table.weight)
        for block, gradient in zip(self.blocks, results[4:], strict=True):
            if gradient.dim() == 2:  # (H, S), by steps
                steps = bias_steps(
                    self.table.num_embeddings, self.table.max_distance, gradient.device
                )
                total.index_add_(0, steps.bucket_S, gradient.T.float())
                continue
            pairs = self.table.for_pairs(block.query_positions, block.key_positions)
            (own,) = torch.autograd.grad(pairs, self.table.weight, gradient.float())
            total += own
        return [*results[:4], total]


Heads = tuple[torch.Tensor, ...]
Attend = Callable[[Work, Block, torch.Tensor, Heads], tuple[torch.Tensor, torch.Tensor]]


def attend_of(name: str) -> Attend:
    """Return a way to compute a block: results, and what its bias gets a gradient by."""
    if name.startswith("triton"):
        return triton_with(Tiles(*map(int, name.partition(" ")[2].split("x"))))
    if name == "flex":
        return flex()
    attend = ATTENTIONS[name].attend  # type: ignore[index]

    def dense(work: Work, _: Block, bias: torch.Tensor, heads: Heads):  # type: ignore[no-untyped-def]
        leaf = bias.detach().requires_grad_()
        return attend(*heads, leaf, dropout=work.dropout), leaf

    return dense


def triton_with(tiles: Tiles) -> Attend:
    def attend(work: Work, block: Block, _: torch.Tensor, heads: Heads):  # type: ignore[no-untyped-def]
        triton_attention.TILES = tiles
        rule = bias_rule(block, work.table, heads[0])
        assert rule.by_step_HS is not None
        leaf = rule.by_step_HS.detach().requires_grad_()
        return attend_triton(*heads, rule._replace(by_step_HS=leaf), dropout=work.dropout), leaf

    return attend


def flex() -> Attend:
    """FlexAttention with bias and staircase in `score_mod`, read from the same arrays as ours."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(work: Work, block: Block, _: torch.Tensor, heads: Heads):  # type: ignore[no-untyped-def]
        rule = bias_rule(block, work.table, heads[0])
        assert rule.by_step_HS is not None
        assert rule.step_of_distance is not None
        leaf = rule.by_step_HS.detach().requires_grad_()
        steps, hides = rule.step_of_distance, rule.hides
        queries, keys = rule.query_facts, rule.key_facts
        far = len(steps) // 2

        def score_mod(score, b, h, q, m):  # type: ignore[no-untyped-def]
            distance = (keys[0, b, m] - queries[0, b, q]).clamp(-far, far)
            score = score + leaf[h, steps[far + distance]]
            if not hides:
                return score
            seen = (keys[1, b, m] <= queries[1, b, q]) & (queries[1, b, q] < keys[2, b, m])
            return torch.where(seen, score, -torch.inf)

        return compiled(*heads, score_mod=score_mod), leaf

    return attend


def agreement(
    arguments: argparse.Namespace, device: torch.device, attend: Attend, truth: Tensors
) -> tuple[float, bool]:
    """Return how far off the formula's results in float32 it is, and whether it repeats itself."""
    work = Work(arguments, device, dropout=0.0)
    found, again = (work.with_table(work.run(attend)) for _ in range(2))
    off_by = max(
        ((one.float() - other).norm() / other.norm()).item()
        for one, other in zip(found, truth, strict=True)
    )
    return off_by, torch.equal(found[-1], again[-1])


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
