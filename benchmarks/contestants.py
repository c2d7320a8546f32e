"""The training steps that the benchmarks compare: ours and its alternatives.

    ours        MPNet, as `pretrain-mpnet` trains it (--attention auto, tuned allocator)
    ours-mlm    the same network, plain masked language modelling
    permuted    MPNet in the paper's form, in PyTorch's standard operations (`permuted_form.py`)
    hf          transformers' MPNetForMaskedLM, plain masked language modelling
    products    only the matrix products of our step: a lower bound for any step on this machine

A step is one forward pass, backward pass and AdamW update on one micro-batch of full sequences. On
a GPU, ours is a whole update as in a run: clipped, and recorded as a CUDA graph (unless
`--not-recorded`).

Each contestant can run in its own process (`Worker`). The allocator setting of ours
(`fast/allocator.py`) then does not help the others, and peak memory is measured separately.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import nn

from annotated_mpnet.fast.allocator import keep_memory
from annotated_mpnet.fast.attention import ATTENTIONS
from annotated_mpnet.fast.projection import padded_linear
from annotated_mpnet.fast.recording import RecordedStep
from annotated_mpnet.mpnet import loop
from annotated_mpnet.mpnet.batch import NOT_PREDICTED, Batch
from annotated_mpnet.mpnet.config import InputMode, OptimizationConfig
from annotated_mpnet.mpnet.optimizer import build_optimizer
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.preparation import choose_attention
from annotated_mpnet.settings.config import Attention
from annotated_mpnet.training.throughput import layer_shape, memory_peak
from annotated_mpnet.training.trainer import DeferredCheck
from common import SHAPES, Shape, hugging_face, make_batch, model_config, num_predicted
from permuted_form import PermutedForm

Step = Callable[[], None]
Loss = Callable[[], torch.Tensor]

CONTESTANTS = ("ours", "permuted", "hf", "ours-mlm", "products")


@dataclass(frozen=True)
class Setting:
    """What all contestants of a comparison share.

    Attributes:
        shape: the network and the micro-batch.
        dropout: everywhere except after the activation.
        bf16: run matrix products in bfloat16.
        device: where to train.
        attention: the attention implementation of ours.
        compile: compile ours.
        recorded: record ours as a CUDA graph, on a GPU.
    """

    shape: Shape
    dropout: float = 0.0
    bf16: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    attention: Attention = "auto"
    compile: bool = False
    recorded: bool = True

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU with CUDA."""
        return self.device.type == "cuda"

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """Make a setting from the flags of `add_flags`."""
        shape = SHAPES[arguments.shape]
        if arguments.width is not None:
            # Keep MPNet's proportions as far as they divide evenly.
            heads = max(1, round(shape.heads * arguments.width / shape.width))
            shape = replace(shape, width=arguments.width, ffn=4 * arguments.width, heads=heads)
        sizes = {name: getattr(arguments, name) for name in ("layers", "batch", "length")}
        shape = replace(shape, **{name: size for name, size in sizes.items() if size is not None})
        return cls(
            shape,
            arguments.dropout,
            arguments.precision == "bf16",
            torch.device(arguments.device),
            arguments.attention,
            arguments.compile,
            not arguments.not_recorded,
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a `Setting`."""
    parser.add_argument("--shape", choices=SHAPES, default="base4")
    for name in ("layers", "width", "length", "batch"):
        parser.add_argument(f"--{name}", type=int, help="default: the shape's")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="auto", help="for ours")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--not-recorded", action="store_true", help="ours without CUDA graph")


def mode_of(name: str) -> InputMode:
    """Return the objective of a contestant."""
    return "mlm" if name in ("hf", "ours-mlm") else "mpnet"


def build(name: str, setting: Setting) -> Step:
    """Return a contestant's training step."""
    if name == "products":
        return products(setting)
    batch = make_batch(setting.shape, setting.shape.batch).to(setting.device)
    torch.manual_seed(0)
    make = _hugging_face if name == "hf" else _ours
    module, loss = make(name, setting, batch)
    if isinstance(module, MPNetForPretraining) and name != "permuted" and setting.on_gpu:
        return update_step(module, mode_of(name), batch, setting)
    return training_step(module, loss, setting)


def update_step(
    model: MPNetForPretraining, mode: InputMode, batch: Batch, setting: Setting
) -> Step:
    """Return a function that makes one update as a run does."""
    optimization = OptimizationConfig(lr=1e-5, warmup_updates=0)
    optimizer = build_optimizer(model, optimization, setting.device)
    step = RecordedStep(*batch.input_ids.shape) if setting.recorded else loop.add_gradient
    setup = loop.Setup(
        loop.Network(model, setting.device),
        optimizer,
        optimization,
        mode,
        autocast=torch.autocast("cuda", dtype=torch.bfloat16, enabled=setting.bf16),
        check_finite=DeferredCheck(optimizer, setting.device),
        add_gradient=step,
    )

    def update() -> None:
        loop.update(setup, 0, [batch])

    return update


def training_step(module: nn.Module, loss: Loss, setting: Setting) -> Step:
    """Return a function that does forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    device_type = setting.device.type

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=setting.bf16):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _hugging_face(_: str, setting: Setting, batch: Batch) -> tuple[nn.Module, Loss]:
    module = hugging_face(setting.shape, setting.dropout).to(setting.device).train()
    labels = torch.full_like(batch.input_ids, NOT_PREDICTED)
    labels.scatter_(1, batch.predicted_positions, batch.predicted_ids)
    attention_mask = torch.ones_like(batch.input_ids)

    def loss() -> torch.Tensor:
        output = module(input_ids=batch.input_ids, attention_mask=attention_mask, labels=labels)
        return output.loss  # type: ignore[no-any-return]

    return module, loss


def _ours(name: str, setting: Setting, batch: Batch) -> tuple[nn.Module, Loss]:
    """Return our network, and its loss in our form or the paper's."""
    model = our_model(setting) if name != "permuted" else _plain(setting)
    if name == "permuted":
        permuted = PermutedForm(model)
        return model, lambda: permuted.loss_sum(batch) / batch.num_predicted
    mode = mode_of(name)
    return model, lambda: model.loss_sum(batch, mode) / batch.num_predicted


def our_model(setting: Setting) -> MPNetForPretraining:
    """Return our network, prepared for training as a run does it."""
    model = _plain(setting)
    model.use_attention(ATTENTIONS[choose_attention(setting.attention, setting.device)[0]])
    if setting.on_gpu:
        model.lm_head.project = padded_linear
    if setting.compile:
        from annotated_mpnet.fast.compilation import compile_model

        compile_model(model, setting.device, lengths_vary=False)
    return model


def _plain(setting: Setting) -> MPNetForPretraining:
    config = model_config(setting.shape, setting.dropout)
    return MPNetForPretraining(config).to(setting.device).train()


def products(setting: Setting) -> Step:
    """Return a function that does only the matrix products of our step."""
    shape = setting.shape
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    B, L, D, P = shape.batch, shape.length, shape.width, num_predicted(shape.length)
    queries, keys, _ = layer_shape("mpnet", L, P)

    def tensors(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=setting.device, dtype=dtype)

    # A layer's linear maps as (positions, in, out), and its attention as (queries, keys).
    linear = [(queries, D, D), (keys, D, 2 * D), (queries, D, D)]
    linear += [(queries, D, shape.ffn), (queries, shape.ffn, D)]
    last = [(P, D, D), (keys, D, 2 * D), (P, D, D), (P, D, shape.ffn), (P, shape.ffn, D)]
    inner, heads = shape.layers - 1, shape.heads
    maps = [(inner, each) for each in linear] + [(1, each) for each in last]
    maps += [(1, (P, D, D)), (1, (P, D, shape.vocab))]
    scores = [(inner, (L, L)), (inner, (2 * P, L + P)), (1, (P, L + P))]
    prepared = [
        (times, tensors(B * positions, into), tensors(out, into), tensors(B * positions, out))
        for times, (positions, into, out) in maps
    ]
    attention = [
        (times, tensors(B * heads, q, D // heads), tensors(B * heads, m, D // heads))
        for times, (q, m) in scores
    ]

    def step() -> None:
        for times, inputs, weight, gradient in prepared:
            for _ in range(times):
                inputs @ weight.T, gradient @ weight, gradient.T @ inputs
        for times, query, key in attention:
            weights = query @ key.transpose(1, 2)
            for _ in range(times):
                # Scores and weighted sums of values; two products each in the backward pass.
                query @ key.transpose(1, 2), weights @ key
                query @ key.transpose(1, 2), weights.transpose(1, 2) @ query
                weights @ key, weights.transpose(1, 2) @ query

    return step


def timed(step: Step, device: torch.device, times: int = 1) -> float:
    """Return the seconds per step, averaged over `times` steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


class Worker:
    """A contestant in its own process, which makes a step on request.

    The process runs a script (by default the running one) with `--worker NAME` before its flags;
    the script then calls `work`.

    Attributes:
        seconds: seconds per step, one entry per turn.
        memory_gb: peak memory; known after `end`.
    """

    def __init__(self, name: str, flags: Sequence[str], script: str | None = None) -> None:
        command = [sys.executable, script or sys.argv[0], "--worker", name, *flags]
        self.seconds: list[float] = []
        self.memory_gb = 0.0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._request("ready?")

    def take_a_turn(self) -> None:
        """Time a step."""
        self.seconds.append(self._request("step"))

    def end(self) -> None:
        """End the process and note its peak memory."""
        self.memory_gb = self._request("end")
        self._process.communicate()

    def _request(self, what: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # If the process has ended, writing fails or the reply is empty.
        with suppress(BrokenPipeError):
            print(what, file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            # Its own message is on stderr.
            self._process.communicate()
            raise SystemExit(f"a worker failed with exit code {self._process.returncode}")
        return float(reply)


def work(name: str, setting: Setting, steps: int = 1, same_allocator: bool = False) -> None:
    """Run as a `Worker`: reply to each line from the parent process with a number.

    Args:
        name: the contestant.
        setting: shared by all contestants.
        steps: steps per turn; the reply is their mean.
        same_allocator: use the allocator setting of ours for other contestants too.
    """
    device = setting.device
    before = memory_now(device, "VmRSS")
    if device.type == "cpu" and (name.startswith("ours") or same_allocator):
        keep_memory()
    step = build(name, setting)
    for _ in range(3):  # warm up: compile or select kernels, allocate memory
        step()
    serve(step, device, steps, before)


def serve(step: Step, device: torch.device, steps: int, before: float = 0.0) -> None:
    """Obey a `Worker`: a step per request; `before` is memory that is not counted."""
    for line in sys.stdin:
        match line.strip():
            case "ready?":
                print(0.0, flush=True)
            case "step":
                print(timed(step, device, steps), flush=True)
            case "end":
                print(memory_now(device, "VmHWM") - before, flush=True)
                return


def memory_now(device: torch.device, what: str) -> float:
    """Return GB: the GPU's peak, or an entry of this process's status on Linux."""
    # `resource` will not do on Linux: a process inherits the peak of its parent.
    if device.type == "cuda" or sys.platform != "linux":
        return memory_peak(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e9
