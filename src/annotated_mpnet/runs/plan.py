"""What a run is going to do and to cost, said before its first update.

Most failed runs are wrong from the start: an update of 128 sequences where 8192 were meant, 0.01
epochs instead of 10, a network that does not fit, a week instead of an hour. Of the preset `demo`:

    device: cpu (the best that PyTorch finds here), float32
    attention: blocked (auto: the fastest on a CPU)
    model: 1.7 M parameters, 3 layers, 128 wide, 8,000 tokens, 287 MFLOP a sequence
    start: local, some heads prefer a neighbouring token (--relative-bias-init)
    training text: ...
    validation text: ...
    update: 32 sequences (32 x 1 micro-batches), up to 2,048 tokens
    training: 1,000 updates, ... epochs of ... sequences
    memory: about 662 MB of ...; 545 MB are in use before the first update
    weights, gradients and AdamW: 26 MB; activations: 77 MB
    checkpoints: written beside training, from a copy of 20 MB in memory
    no CUDA: about 17 MPNet-base sequences a minute here, 54,680 on an H200; no MFU
    time: about 1 min 32 s in all, if a thread does 50 GFLOP/s (threads: 2)

Memory is an estimate (`training/memory_estimate.py`). Time is an order of magnitude: the work of an
update, at a third of a GPU's peak or 50 GFLOP/s for each CPU thread. Both describe the worst case,
full sequences in the longest batches.
"""

import os
from collections.abc import Iterator

import numpy as np
import torch

from annotated_mpnet.fast.attention import AttentionName
from annotated_mpnet.mpnet.config import ModelConfig, ObjectiveConfig, OptimizerName
from annotated_mpnet.mpnet.masking import count_predicted
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.texts import Text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.text.mixture import ROUND, Mixture
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.tracking.display import duration, size
from annotated_mpnet.training.busy import busy_cores
from annotated_mpnet.training.memory_estimate import Workload, means_bytes
from annotated_mpnet.training.muon import matrix_rate
from annotated_mpnet.training.throughput import device_name, memory_in_use, peak_flops

SHARE_OF_PEAK = 0.33
"""Of a GPU's peak, reached by good training code; networks narrower than MPNet-base reach less."""

BUSY = 0.3
"""Cores at work before the run begins, from which on the plan says so."""

FLOPS_PER_THREAD = 50e9
"""Of a current CPU, for float32 products of a decent size."""


def plan(
    config: PretrainingConfig,
    text: Text,
    model: MPNetForPretraining,
    device: torch.device,
    bf16: bool,
    attention: tuple[AttentionName, str],
    recording: str | None,
    world_size: int,
) -> Iterator[str]:
    """Yield the lines; the weights of `model` may be sharded already."""
    machine, optimization, run = config.machine, config.optimization, config.run
    work = Workload(
        model.config,
        config.objective.input_mode,
        optimization.batch_size,
        config.data.max_tokens,
        _predicted(config.data.max_tokens, config.objective),
        bf16=bf16,
        attention=attention[0],
        on_gpu=device.type == "cuda",
        recompute=machine.gradient_checkpointing,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())

    why = "asked for" if machine.device != "auto" else "the best that PyTorch finds here"
    name = f", {device_name(device)}" if device.type == "cuda" else ""
    yield f"device: {device}{name} ({why}), {'bfloat16' if bf16 else 'float32'}"
    alone = device.type == "cpu" and world_size == 1
    if alone and (busy := busy_cores() or 0.0) > BUSY:
        there = len(os.sched_getaffinity(0))
        yield f"other work uses {busy:.1f} of {there} cores: all will take longer than planned"
    if world_size > 1:
        share = "its share of the weights (FSDP)" if machine.fsdp else "all weights (DDP)"
        yield f"processes: {world_size}, each with {share}"
    elif machine.fsdp:
        yield "processes: 1; --fsdp has no effect until torchrun starts more"
    yield f"attention: {attention[0]} ({attention[1]})"
    if recording is not None:
        yield f"micro-batches: {recording}"
    if machine.compile:
        yield "compiled: the first update takes minutes"

    layers = model.config.encoder_layers
    yield (
        f"model: {_count(parameters)} parameters, {layers} layer{'s' * (layers != 1)}, "
        f"{model.config.encoder_embed_dim} wide, {model.config.vocab_size:,} tokens, "
        f"{_flop(work.flops() / work.batch_size)} a sequence"
    )
    fresh = not run.resuming and run.initial_weights is None
    has_bias = config.model.relative_attention_num_buckets > 0
    if fresh and has_bias and optimization.relative_bias_init != "normal":
        yield "start: local, some heads prefer a neighbouring token (--relative-bias-init)"

    if isinstance(text.train, PackedSequences):
        yield f"training text: {text.train.report}"
        yield from text.train.report.warnings(config.objective.whole_word_mask)
    else:
        yield f"training text: stream of {text.train.fingerprint}"
    if text.valid is not None:
        yield f"validation text: {text.valid.report}"
        yield from text.valid.report.warnings(config.objective.whole_word_mask)
    else:
        yield "no validation text (--valid-file, --valid-fraction): the last model is the best"
    per_update = optimization.batch_size * optimization.update_freq * world_size
    factors = f"{optimization.batch_size} x {optimization.update_freq} micro-batches"
    factors += f" x {world_size} processes" if world_size > 1 else ""
    tokens = per_update * config.data.max_tokens
    yield f"update: {per_update:,} sequences ({factors}), up to {tokens:,} tokens"
    total, updates = optimization.total_updates * per_update, optimization.total_updates
    if isinstance(text.train, Mixture):
        yield f"training: {updates:,} updates, {total:,} sequences, of which"
        for path, part, turns in zip(
            config.data.train_dirs, text.train.parts, text.train.turns, strict=True
        ):
            epochs = f"{total * turns / ROUND / len(part):,.2f} epochs of {len(part):,} sequences"
            yield f"  {turns / ROUND:.1%} are from {path}, {epochs}"
    elif isinstance(text.train, PackedSequences):
        epoch = len(text.train)
        epochs = f"{total / epoch:,.2f}" if total >= epoch / 100 else "less than 0.01"
        yield f"training: {updates:,} updates, {epochs} epochs of {epoch:,} sequences"
    else:
        yield f"training: {updates:,} updates, {total:,} sequences of the stream"

    if optimization.optimizer == "muon":
        yield (
            f"optimizer: Muon at {matrix_rate(optimization):g} for the matrices of layers and "
            f"head, AdamW at {optimization.lr:g} for all else"
        )
    means = means_bytes(model, optimization.optimizer)
    # FSDP shards weights, gradients and means, but not activations.
    fixed = (8 * parameters + means) / (world_size if machine.fsdp else 1)
    copied = 4 * parameters + means * run.save_optimizer_state
    yield from _memory(work, fixed, copied, device, optimization.optimizer)
    yield from _time(work.flops() * optimization.update_freq * updates, device, bf16)


def _predicted(length: int, objective: ObjectiveConfig) -> int:
    """Return P of a full sequence: of 512 tokens, 15 % of the 510 between <s> and </s>."""
    return int(count_predicted(np.array(length - 2), objective.pred_prob))


def _memory(
    work: Workload, fixed: float, copied: float, device: torch.device, optimizer: OptimizerName
) -> Iterator[str]:
    """Compare what a micro-batch needs, on top of `fixed` bytes, with all memory of the device."""
    activations = work.activation_bytes()
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        needed, before = fixed + activations, ""
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        in_use = memory_in_use()
        before = f"; {size(in_use)} are in use before the first update"
        # The weights, about a quarter of what is fixed, are in use already.
        needed = in_use + 0.75 * fixed + activations + (copied if device.type == "cpu" else 0)
    yield f"memory: about {size(needed)} of {size(there)}{before}"
    name = "Muon" if optimizer == "muon" else "AdamW"
    yield f"weights, gradients and {name}: {size(fixed)}; activations: {size(activations)}"
    if needed > 0.9 * there:
        yield "this may not fit: halve --batch-size, double --update-freq (same update)"
    where = "memory" if device.type == "cpu" else "the CPU's memory"
    yield f"checkpoints: written beside training, from a copy of {size(copied)} in {where}"


def _time(flops: float, device: torch.device, bf16: bool) -> Iterator[str]:
    """Say how long all updates may take, without data, evaluations and checkpoints."""
    if device.type == "cuda":
        peak = peak_flops(device_name(device), bf16)
        if peak is None:
            products = "bfloat16" if bf16 else "float32"
            yield f"no MFU: the peak of this device for {products} products is not known here"
            return
        speed = SHARE_OF_PEAK * peak
        assumed = f"if {SHARE_OF_PEAK:.0%} of {peak / 1e12:.0f} TFLOP/s are reached"
    else:
        threads = torch.get_num_threads()
        speed = threads * FLOPS_PER_THREAD
        assumed = f"if a thread does 50 GFLOP/s (threads: {threads})"
        base = Workload(ModelConfig(), "mpnet", 1, 512, _predicted(512, ObjectiveConfig())).flops()
        h200 = SHARE_OF_PEAK * 989e12
        yield (
            f"no CUDA: about {60 * speed / base:,.0f} MPNet-base sequences a minute here, "
            f"{60 * h200 / base:,.0f} on an H200; no MFU"
        )
    yield f"time: about {duration(flops / speed)} in all, {assumed}"


def _flop(amount: float) -> str:
    """Return operations in three digits.

    >>> _flop(287.4e6), _flop(14.5e9), _flop(358e9), _flop(1.23e12)
    ('287 MFLOP', '14.5 GFLOP', '358 GFLOP', '1.23 TFLOP')
    """
    scale, unit = (1e12, "T") if amount >= 1e12 else (1e9, "G") if amount >= 1e9 else (1e6, "M")
    value = amount / scale
    return f"{value:,.0f} {unit}FLOP" if value >= 100 else f"{value:.3g} {unit}FLOP"


def _count(parameters: int) -> str:
    """Return a number of weights.

    >>> _count(109_518_527), _count(35_856)
    ('109.5 M', '36 k')
    """
    return f"{parameters / 1e6:.1f} M" if parameters >= 100_000 else f"{parameters / 1e3:.0f} k"
