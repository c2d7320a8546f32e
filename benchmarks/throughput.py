"""One training step, ours beside others: tokens per second, memory, MFU.

    python benchmarks/throughput.py [--shape base4|demo|base] [--dropout 0.1]
            [--precision fp32|bf16] [--with ours permuted hf ours-mlm] [--pairs 7] [--json FILE]

A step is forward, backward and AdamW, on one micro-batch of full rows.

    ours        MPNet, as `pretrain-mpnet` trains it (--attention auto, memory that is kept)
    ours-mlm    the same network, plain masked language modelling
    permuted    MPNet in the paper's form, with PyTorch's standard operations (`permuted_form.py`)
    hf          transformers' MPNetForMaskedLM, plain masked language modelling
    products    the matrix products of a step of ours alone, one after the other: the floor below
                which no step can get on the machine

Each runs in a process of its own, as its user would start it, and they take turns: A B C A B C. The
ratios are those of the same round, so that what else the machine does in the meantime hits all of
them alike, and the median of the ratios is what can be repeated. `--same-allocator` gives all of
them the memory that ours keeps (`training/allocator.py`).

Convention: tokens are input tokens without padding; MFU is what `training/throughput.py` says, on a
GPU whose peak is known. Memory is the most that a process took above what it had before the network
was built; on CUDA, the most that tensors took.
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
from annotated_mpnet.config import InputMode, ModelConfig
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.preparation import choose_attention
from annotated_mpnet.training.allocator import keep_memory
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
CONTESTANTS = ("ours", "permuted", "hf", "ours-mlm", "products")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return
    workers = {name: Worker(name) for name in arguments.contestants}
    for _ in range(arguments.pairs):
        for worker in workers.values():
            worker.take_a_turn()
    for worker in workers.values():
        worker.end()
    report = table(arguments, workers)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class Worker:
    """A contestant in a process of its own, which steps when it is told to.

    Attributes:
        seconds: of a step, one entry for each turn.
        memory_gb: the most that it took; known at its end.
    """

    def __init__(self, name: str) -> None:
        command = [sys.executable, *sys.argv, "--worker", name]
        self.seconds: list[float] = []
        self.memory_gb = 0.0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask("ready?")

    def take_a_turn(self) -> None:
        """Have it step, and keep the time."""
        self.seconds.append(self._ask("step"))

    def end(self) -> None:
        """Ask for its peak of memory, and end it."""
        self.memory_gb = self._ask("end")
        self._process.wait()

    def _ask(self, what: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def work(arguments: argparse.Namespace) -> None:
    """Answer each line from the parent process with a number."""
    device = torch.device(arguments.device)
    before = memory_now(device, "VmRSS")
    if arguments.worker in ("ours", "ours-mlm") or arguments.same_allocator:
        keep_memory()
    step = products(arguments) if arguments.worker == "products" else build(arguments)
    for _ in range(3):  # kernels are looked for, or compiled, and memory is asked for
        step()
    for line in sys.stdin:
        match line.strip():
            case "ready?":
                print(0.0, flush=True)
            case "step":
                print(timed(step, device, arguments.steps), flush=True)
            case "end":
                print(memory_now(device, "VmHWM") - before, flush=True)
                return


def memory_now(device: torch.device, what: str) -> float:
    """Return GB: of the device the peak; of this process what Linux says under a name."""
    if device.type == "cuda":
        return memory_peak(device)
    # Not from `resource`: there a process inherits the peak of the one that started it.
    if sys.platform != "linux":
        return memory_peak(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e9


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
    parser.add_argument("--same-allocator", action="store_true", help="for all, not for ours only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> Step:
    """Return a function that makes one step of a contestant."""
    name = arguments.worker
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
            mode: InputMode = "mlm" if name == "ours-mlm" else "mpnet"

            def loss() -> torch.Tensor:
                return ours.loss_sum(batch, mode) / batch.num_predicted

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
    model.use_attention(choose_attention(arguments.attention, device)[0])
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


def table(arguments: argparse.Namespace, workers: dict[str, Worker]) -> dict[str, object]:
    """Print the table, and return what is in it."""
    shape, device = SHAPES[arguments.shape], torch.device(arguments.device)
    rows, P = arguments.batch or shape.batch, num_predicted(shape.length)
    peak = peak_flops(device_name(device), arguments.precision == "bf16")
    print(f"{rows} x {shape.length} tokens, {P} of each row predicted; {asdict(shape)}")
    print(f"{arguments.precision}, dropout {arguments.dropout}, {machine(device)}")
    print(
        f"{'':<10}{'s/step':>9}{'tokens/s':>10}{'predicted/s':>12}{'MFU':>7}{'GB':>7}{'ratio':>8}"
    )
    results: dict[str, object] = {}
    first = next(iter(workers.values())).seconds
    for name, worker in workers.items():
        median = statistics.median(worker.seconds)
        ratio = statistics.median(a / b for a, b in zip(worker.seconds, first, strict=True))
        mode: InputMode = "mlm" if name in ("hf", "ours-mlm") else "mpnet"
        flops = training_flops(model_config(shape, 0.0), mode, rows, shape.length, P)
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
