"""One training step, ours beside others: tokens per second, memory, MFU.

    python benchmarks/throughput.py [--shape base4|demo|base] [--dropout 0.1]
            [--precision fp32|bf16] [--with ours permuted hf ours-mlm] [--pairs 7] [--json FILE]

A step is forward, backward and AdamW, on one micro-batch of full rows. The contestants take turns,
A B C A B C, in one process, and the ratios are those of the same round: what else the machine does
in the meantime hits all of them alike, and the median of the ratios is what can be repeated.

    ours        MPNet, as `pretrain-mpnet` trains it (--attention auto)
    ours-mlm    the same network, plain masked language modelling
    permuted    MPNet in the paper's form, with PyTorch's standard operations (`permuted_form.py`)
    hf          transformers' MPNetForMaskedLM, plain masked language modelling

Peak memory is each contestant's own, in a process of its own (on CUDA: of the device).

Convention: tokens are input tokens without padding; MFU is what `training/throughput.py` says, on a
GPU whose peak is known. The work of the matrix products alone is timed too: as products of the same
shapes, one after the other, which is the floor that a step cannot get below on the machine.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import MPNetConfig, MPNetForMaskedLM

from annotated_mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.config import ModelConfig
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.training.throughput import (
    device_name,
    layer_shape,
    memory_peak,
    peak_flops,
    training_flops,
)
from permuted_form import PermutedForm

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """A network and a micro-batch."""

    layers: int
    width: int
    ffn: int
    heads: int
    vocab: int
    batch: int
    length: int


SHAPES = {
    "base4": Shape(4, 768, 3072, 12, 30527, 4, 512),
    "base": Shape(12, 768, 3072, 12, 30527, 64, 512),
    "demo": Shape(3, 128, 512, 4, 8000, 32, 64),
}
CONTESTANTS = ("ours", "permuted", "hf", "ours-mlm")


def main() -> None:
    arguments = parse()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments)))
        return
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    steps = {name: build(name, arguments) for name in arguments.contestants}
    times: dict[str, list[float]] = {name: [] for name in steps}
    floors = []
    for step in steps.values():  # kernels are looked for, or compiled, and memory is asked for
        step(), step()
    for _ in range(arguments.pairs):
        for name, step in steps.items():
            times[name].append(timed(step, device, arguments.steps))
        if arguments.floor:
            floors.append(timed(products(arguments), device, arguments.steps))
    report = table(arguments, shape, times, floors)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="base4")
    parser.add_argument("--batch", type=int, help="rows, instead of the shape's")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--with", dest="contestants", nargs="+", default=CONTESTANTS)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", action="store_true", help="ours with --compile")
    parser.add_argument("--pairs", type=int, default=7, help="rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of a contestant in a round")
    parser.add_argument("--floor", action="store_true", help="time the matrix products alone too")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str, arguments: argparse.Namespace) -> Step:
    """Return a function that makes one step of a contestant."""
    shape, device = SHAPES[arguments.shape], torch.device(arguments.device)
    batch = make_batch(shape, arguments.batch or shape.batch).to(device)
    torch.manual_seed(0)
    if name == "hf":
        module: nn.Module = hugging_face(shape, arguments.dropout).to(device).train()
        labels = torch.full_like(batch.input_ids, NOT_PREDICTED)
        labels.scatter_(1, batch.predicted_positions, batch.predicted_ids)
        everything = torch.ones_like(batch.input_ids)

        def loss() -> torch.Tensor:
            found = module(input_ids=batch.input_ids, attention_mask=everything, labels=labels)
            return found.loss  # type: ignore[no-any-return]
    else:
        ours = MPNetForPretraining(model_config(shape, arguments.dropout)).to(device).train()
        module = ours
        if name == "permuted":
            permuted = PermutedForm(ours)

            def loss() -> torch.Tensor:
                return permuted.loss_sum(batch) / batch.num_predicted
        else:
            prepare(ours, arguments, device)
            mode = "mlm" if name == "ours-mlm" else "mpnet"

            def loss() -> torch.Tensor:
                return ours.loss_sum(batch, mode) / batch.num_predicted  # type: ignore[arg-type]

    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    bf16 = arguments.precision == "bf16"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def prepare(
    model: MPNetForPretraining, arguments: argparse.Namespace, device: torch.device
) -> None:
    """Do what a run does with its network before it trains."""
    if arguments.attention != "auto":
        model.use_attention(arguments.attention)
    if arguments.compile:
        from annotated_mpnet.training.compilation import compile_model

        compile_model(model, device, lengths_vary=False)


def model_config(shape: Shape, dropout: float) -> ModelConfig:
    return ModelConfig(
        encoder_layers=shape.layers,
        encoder_embed_dim=shape.width,
        encoder_ffn_dim=shape.ffn,
        encoder_attention_heads=shape.heads,
        vocab_size=shape.vocab,
        max_positions=shape.length,
        mask_token_id=shape.vocab - 1,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=0.0,
    )


def hugging_face(shape: Shape, dropout: float) -> nn.Module:
    return MPNetForMaskedLM(
        MPNetConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=shape.length + 2,
        )
    )


def num_predicted(length: int) -> int:
    return round(0.15 * length)


def make_batch(shape: Shape, rows: int) -> Batch:
    """Return full rows of random tokens, of which 15 % are predicted, all by a mask."""
    generator = torch.Generator().manual_seed(1)
    L, P = shape.length, num_predicted(shape.length)
    original_BL = torch.randint(5, shape.vocab - 1, (rows, L), generator=generator)
    positions_BP = torch.rand(rows, L - 2, generator=generator).argsort(dim=1)[:, :P] + 1
    ids_BP = original_BL.gather(1, positions_BP)
    masked_BL = original_BL.scatter(1, positions_BP, shape.vocab - 1)
    return Batch(masked_BL, positions_BP, ids_BP, None, rows * L, rows * P)


def products(arguments: argparse.Namespace) -> Step:
    """Return a function that does the matrix products of a step of ours, and nothing else."""
    shape, device = SHAPES[arguments.shape], torch.device(arguments.device)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    B, L, D, P = (
        arguments.batch or shape.batch,
        shape.length,
        shape.width,
        num_predicted(shape.length),
    )
    asking, answering, _ = layer_shape("mpnet", L, P)

    def tensors(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    # (rows, in, out) of the linear maps of a layer, and (queries, keys) of its attention.
    linear = [(asking, D, D), (answering, D, 2 * D), (asking, D, D)]
    linear += [(asking, D, shape.ffn), (asking, shape.ffn, D)]
    last = [(P, D, D), (answering, D, 2 * D), (P, D, D), (P, D, shape.ffn), (P, shape.ffn, D)]
    inner, heads = shape.layers - 1, shape.heads
    maps = [(inner, each) for each in linear] + [(1, each) for each in last]
    maps += [(1, (P, D, D)), (1, (P, D, shape.vocab))]
    scores = [(inner, (L, L)), (inner, (2 * P, L + P)), (1, (P, L + P))]
    prepared = [
        (times, tensors(B * rows, into), tensors(out, into), tensors(B * rows, out))
        for times, (rows, into, out) in maps
    ]
    attention = [
        (times, tensors(B * heads, q, D // heads), tensors(B * heads, m, D // heads))
        for times, (q, m) in scores
    ]

    def step() -> None:
        for times, rows, weight, gradient in prepared:
            for _ in range(times):
                rows @ weight.T, gradient @ weight, gradient.T @ rows
        for times, query, key in attention:
            weights = query @ key.transpose(1, 2)
            for _ in range(times):
                # Scores and what is gathered; on the way back two products for each of them.
                query @ key.transpose(1, 2), weights @ key
                query @ key.transpose(1, 2), weights.transpose(1, 2) @ query
                weights @ key, weights.transpose(1, 2) @ query

    return step


def timed(step: Step, device: torch.device, times: int) -> float:
    """Return the seconds of one step, as the mean of several."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def measure_memory(arguments: argparse.Namespace) -> float:
    """Return the peak of memory of a contestant, in GB, above that of the bare process."""
    device = torch.device(arguments.device)
    before = 0.0 if device.type == "cuda" else memory_peak(device)
    step = build(arguments.memory_of, arguments)
    step(), step()
    return memory_peak(device) - before


def memory_of(name: str) -> float:
    """Measure memory in a process of its own: a process never forgets its peak."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(
    arguments: argparse.Namespace,
    shape: Shape,
    times: dict[str, list[float]],
    floors: list[float],
) -> dict[str, object]:
    device, bf16 = torch.device(arguments.device), arguments.precision == "bf16"
    rows, P = arguments.batch or shape.batch, num_predicted(shape.length)
    config, peak = model_config(shape, arguments.dropout), peak_flops(device_name(device), bf16)
    print(f"{rows} x {shape.length} tokens, {P} of each row predicted; {asdict(shape)}")
    print(f"{arguments.precision}, dropout {arguments.dropout}, {machine(device)}")
    print(
        f"{'':<10}{'s/step':>9}{'tokens/s':>10}{'predicted/s':>12}{'MFU':>7}{'GB':>7}{'ratio':>8}"
    )
    results: dict[str, object] = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        first = next(iter(times.values()))
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        mode = "mlm" if name in ("hf", "ours-mlm") else "mpnet"
        work = training_flops(config, mode, rows, shape.length, P)  # type: ignore[arg-type]
        mfu = None if peak is None else work / median / peak
        memory = None if arguments.no_memory else memory_of(name)
        results[name] = {
            "seconds": seconds, "median": median, "ratio_to_first": ratio, "mfu": mfu,
            "tokens_per_second": rows * shape.length / median,
            "predicted_per_second": rows * P / median, "memory_gb": memory,
        }  # fmt: skip
        print(
            f"{name:<10}{median:>9.4f}{rows * shape.length / median:>10,.0f}"
            f"{rows * P / median:>12,.0f}{'' if mfu is None else f'{mfu:.1%}':>7}"
            f"{'' if memory is None else f'{memory:.2f}':>7}{ratio:>7.2f}x"
        )
    if floors:
        floor, ours = statistics.median(floors), next(iter(times.values()))
        share = statistics.median(f / o for f, o in zip(floors, ours, strict=True))
        print(f"products alone {floor:.4f} s: {share:.0%} of the first contestant's step")
        results["products"] = {"seconds": floors, "median": floor, "share_of_first": share}
    settings = {key: str(value) for key, value in vars(arguments).items()}
    return {"settings": settings, "machine": machine(device), "shape": asdict(shape)} | results


def machine(device: torch.device) -> str:
    name = device_name(device) if device.type == "cuda" else processor()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return (
        f"{name}{threads}, PyTorch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
