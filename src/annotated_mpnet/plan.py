"""What a run is going to do and to cost, said before its first update.

Most runs that fail are wrong from the beginning: an update of 128 rows where 8192 were meant, 0.01
epochs where 10 were, a network that does not fit, a week where an hour was thought of. All of this
is known before the first update, and takes a dozen lines to say. Those of the preset `demo`, on two
cores of a CPU:

    device: cpu (the best that PyTorch finds here), float32
    attention: blocked (auto: the fastest on a CPU)
    model: 1.7 M parameters, 3 layers, 128 wide, 8,000 tokens, 0.287 GFLOP a row
    start: local, some heads prefer a neighbouring token (--relative-bias-init)
    training text: ...
    validation text: ...
    update: 32 rows (32 x 1 micro-batches), up to 2,048 tokens
    training: 1,000 updates, ... epochs of ... rows
    memory: about 0.12 of ... GB, 0.026 of them weights, gradients and AdamW
    checkpoints: written beside training, from a copy of 0.02 GB in memory
    no CUDA: about 17 rows of MPNet-base a minute here, 54,680 on an H200; no MFU
    time: about 1 min 32 s in all, if a thread does 50 GFLOP/s (threads: 2)

What each line can show in time:

    device, attention     a broken driver, and so the CPU
    model                 a preset's network, where another was meant
    text                  half of the files left out, for their suffix
    update                128 rows where the paper has 8192
    training              0.01 epochs, or 400
    memory, time          an end after an hour, or in a year

Where something was chosen (device, attention), the reason is said with it: a run that is on the CPU
because a driver is broken looks like any other, but for the speed. Each line is short enough for a
terminal, but for those about the text, and all are in `log.txt` and in the report of the run.

**Memory** is estimated, and the only line that can be wrong: `training/memory_estimate.py`. With
`--fsdp` each process holds its share of the weights. What would need more than nine tenths of what
there is comes with the way out, before an hour of tokenising has been followed by an error.

**Time** is measured, not estimated: the tracker says when the run will be done as soon as the first
line of metrics is there. What stands in the plan is an order of magnitude, from the work of an
update (`training/throughput.py`) and a speed that is assumed and said: a third of a GPU's peak, or
50 GFLOP/s for a thread of a CPU. (Two threads took 90 s for the 1000 updates of the preset `demo`,
for which the plan says a minute and a half.) The paper's run, 500,000 updates of 8192 rows, on a
single H200:

>>> print(f"{500_000 * 8192 * _base_row().flops() / H200_FLOPS / 86_400:.0f} days")
52 days

HF: the Trainer logs the number of examples, epochs, batch and steps.

Next: `report.py`, the same at the other end.
"""

import os
from collections.abc import Iterator

import numpy as np
import torch

from annotated_mpnet.config import ModelConfig, ObjectiveConfig, PretrainingConfig
from annotated_mpnet.data import PackedRows
from annotated_mpnet.data.masking import count_predicted
from annotated_mpnet.data.texts import Text
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.preparation import choose_attention
from annotated_mpnet.training.display import duration
from annotated_mpnet.training.memory_estimate import BYTES_PER_WEIGHT, Workload, copied_bytes
from annotated_mpnet.training.throughput import device_name, peak_flops

ASSUMED_SHARE_OF_PEAK = 0.33
"""What well-made training reaches of a GPU's peak; networks narrower than MPNet-base do not."""

ASSUMED_FLOPS_PER_THREAD = 50e9
"""What a thread of a present CPU does with float32 products of a decent size."""

H200_FLOPS = ASSUMED_SHARE_OF_PEAK * 989e12
"""What that is on an H200, to which a CPU is compared."""


def plan(
    config: PretrainingConfig,
    text: Text,
    model: MPNetForPretraining,
    device: torch.device,
    bf16: bool,
    world_size: int,
) -> Iterator[str]:
    """Yield the lines that say what is about to be done.

    The largest thing that can happen is described, not the mean: rows that are full, and batches as
    long as they may be. A run may turn out cheaper than its plan.

    Args:
        config: all settings.
        text: of this rank.
        model: its weights may be shared out already.
        device: where it computes.
        bf16: whether products run in bfloat16.
        world_size: processes.
    """
    work = _workload(config, model.config, device, bf16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield from _machine(config, device, bf16, world_size)
    layers = model.config.encoder_layers
    yield (
        f"model: {_count(parameters)} parameters, {layers} layer{'s' * (layers != 1)}, "
        f"{model.config.encoder_embed_dim} wide, {model.config.vocab_size:,} tokens, "
        f"{work.flops() / work.batch_size / 1e9:.3g} GFLOP a row"
    )
    yield from _start(config)
    if isinstance(text.train, PackedRows):
        yield f"training text: {text.train.report}"
    else:
        yield f"training text: stream of {text.train.fingerprint}"
    if text.valid is not None:
        yield f"validation text: {text.valid.report}"
    else:
        yield "no validation text (--valid-file, --valid-fraction): the last model is the best"
    yield from _amount(config, text, world_size)
    # Sharding divides what belongs to weights, not what belongs to rows.
    shares = world_size if config.machine.fsdp else 1
    copied = parameters * copied_bytes(config.run.save_optimizer_state)
    yield from _memory(work, parameters * BYTES_PER_WEIGHT / shares, copied, device)
    yield from _time(config, work, device, bf16)


def _workload(
    config: PretrainingConfig, model: ModelConfig, device: torch.device, bf16: bool
) -> Workload:
    """Return the largest micro-batch that can come, and how it is computed."""
    # Rows are full, or padded to the longest of the batch.
    length = config.data.max_tokens
    return Workload(
        model,
        config.objective.input_mode,
        config.optimization.batch_size,
        length,
        _predicted(length, config.objective),
        bf16=bf16,
        attention=choose_attention(config.machine.attention, device)[0],
        on_gpu=device.type == "cuda",
        recompute=config.machine.gradient_checkpointing,
    )


def _base_row() -> Workload:
    """Return a full row of MPNet-base, the unit in which machines are compared."""
    return Workload(ModelConfig(), "mpnet", 1, 512, _predicted(512, ObjectiveConfig()))


def _predicted(length: int, objective: ObjectiveConfig) -> int:
    """Return P of a full row: of 512 tokens, 15 % of the 510 that are neither <s> nor </s>."""
    return int(count_predicted(np.array(length - 2), objective.pred_prob))


def _machine(
    config: PretrainingConfig, device: torch.device, bf16: bool, world_size: int
) -> Iterator[str]:
    """Say where and how it is computed, and of what was chosen why.

    >>> from annotated_mpnet.config import MachineConfig
    >>> config = PretrainingConfig(machine=MachineConfig(fsdp=True))
    >>> for line in _machine(config, torch.device("cpu"), bf16=False, world_size=4):
    ...     print(line)
    device: cpu (the best that PyTorch finds here), float32
    processes: 4, each with its share of the weights (FSDP)
    attention: blocked (auto: the fastest on a CPU)
    """
    machine = config.machine
    why = "asked for" if machine.device != "auto" else "the best that PyTorch finds here"
    name = f", {device_name(device)}" if device.type == "cuda" else ""
    yield f"device: {device}{name} ({why}), {'bfloat16' if bf16 else 'float32'}"
    if world_size > 1:
        how = (
            "each with its share of the weights (FSDP)"
            if machine.fsdp
            else "each with all weights (DDP)"
        )
        yield f"processes: {world_size}, {how}"
    elif machine.fsdp:
        yield "processes: 1; --fsdp shares nothing out until torchrun starts more"
    attention, reason = choose_attention(machine.attention, device)
    yield f"attention: {attention} ({reason})"
    if machine.compile:
        yield "compiled: the first update takes minutes"


def _start(config: PretrainingConfig) -> Iterator[str]:
    """Say that the relative position bias starts locally, where weights are drawn.

    >>> list(_start(PretrainingConfig()))
    ['start: local, some heads prefer a neighbouring token (--relative-bias-init)']
    """
    run, start = config.run, config.optimization.relative_bias_init
    has_table = config.model.relative_attention_num_buckets > 0
    if has_table and start != "normal" and not run.resuming and run.initial_weights is None:
        yield "start: local, some heads prefer a neighbouring token (--relative-bias-init)"


def _amount(config: PretrainingConfig, text: Text, world_size: int) -> Iterator[str]:
    """Say how much text an update sees, and how often all of it is seen.

    The paper's update on eight GPUs, of a stream, of which nobody knows the length. (Any text that
    is no table of rows will do here.)

    >>> from types import SimpleNamespace
    >>> from annotated_mpnet.config import OptimizationConfig
    >>> paper = OptimizationConfig(batch_size=32, update_freq=32, total_updates=500_000)
    >>> config = PretrainingConfig(optimization=paper)
    >>> for line in _amount(config, SimpleNamespace(train="a stream"), world_size=8):
    ...     print(line)
    update: 8,192 rows (32 x 32 micro-batches x 8 processes), up to 4,194,304 tokens
    training: 500,000 updates, 4,096,000,000 rows of the stream

    Epochs are worth a look: seen often enough, a text is learned by heart, and the validation loss
    rises while that of the training falls.
    """
    optimization = config.optimization
    # The product of the three factors is what an update sees; how it is divided is what a machine
    # can do, and changes nothing but dropout's masks (`trainer.py`).
    per_update = optimization.batch_size * optimization.update_freq * world_size
    factors = f"{optimization.batch_size} x {optimization.update_freq}"
    processes = f" x {world_size} processes" if world_size > 1 else ""
    tokens = per_update * config.data.max_tokens
    yield (
        f"update: {per_update:,} rows ({factors} micro-batches{processes}), up to {tokens:,} tokens"
    )
    rows = optimization.total_updates * per_update
    if isinstance(text.train, PackedRows):
        epoch = len(text.train)
        yield (
            f"training: {optimization.total_updates:,} updates, {rows / epoch:.2f} epochs of "
            f"{epoch:,} rows"
        )
    else:
        yield f"training: {optimization.total_updates:,} updates, {rows:,} rows of the stream"


def _memory(work: Workload, fixed: float, copied: float, device: torch.device) -> Iterator[str]:
    """Say what is needed and what there is.

    Args:
        work: a micro-batch; an update of several needs no more than one.
        fixed: bytes that no batch size changes, on this device.
        copied: bytes of the copy that checkpoints are written from, in the CPU's memory.
        device: whose memory it is. On a CPU that of the whole machine, whoever else is using it.
    """
    needed, there = fixed + work.activation_bytes(), _total_memory(device)
    if device.type == "cpu":
        needed += copied
    yield (
        f"memory: about {_gb(needed)} of {_gb(there)} GB, {_gb(fixed)} of them weights, gradients "
        "and AdamW"
    )
    # A tenth for what the estimate leaves out. Halving is the first of the ways that `memory.py`
    # names, and changes nothing but dropout's masks.
    if needed > 0.9 * there:
        yield "this may not fit: halve --batch-size, double --update-freq (same rows per update)"
    # Written while others are made: the memory comes on top (`training/saving.py`).
    where = "memory" if device.type == "cpu" else "the CPU's memory"
    yield f"checkpoints: written beside training, from a copy of {_gb(copied)} GB in {where}"


def _time(
    config: PretrainingConfig, work: Workload, device: torch.device, bf16: bool
) -> Iterator[str]:
    """Say how long it may take, and by which assumption.

    Data, evaluations and checkpoints are taken for nothing: they should be (`perf/data_wait`), and
    what they really take depends on disks and intervals.
    """
    flops = work.flops() * config.optimization.update_freq * config.optimization.total_updates
    peak = peak_flops(device_name(device), bf16)
    # A CPU is no error: small networks are made for it. But whoever expected a GPU should see at
    # once what is missing, in a number that needs no explanation.
    if device.type != "cuda":
        threads = torch.get_num_threads()
        speed = threads * ASSUMED_FLOPS_PER_THREAD
        assumed = f"if a thread does 50 GFLOP/s (threads: {threads})"
        row = _base_row().flops()
        here, there = (60 * flops_per_s / row for flops_per_s in (speed, H200_FLOPS))
        yield (
            f"no CUDA: about {here:,.0f} rows of MPNet-base a minute here, {there:,.0f} on an "
            "H200; no MFU"
        )
    elif peak is not None:
        speed = ASSUMED_SHARE_OF_PEAK * peak
        assumed = f"if {ASSUMED_SHARE_OF_PEAK:.0%} of {peak / 1e12:.0f} TFLOP/s are reached"
    else:
        products = "bfloat16" if bf16 else "float32"
        yield f"no MFU: the peak of this device for {products} products is not known here"
        return
    # All updates, those before a resume included; what is left of them is said once it is measured.
    yield f"time: about {duration(flops / speed)} in all, {assumed}"


def _total_memory(device: torch.device) -> float:
    """Return the bytes that there are, and not those that are free at this moment."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _gb(amount: float) -> str:
    """Return bytes in GB (10^9), with two digits, which is more than the estimate is worth.

    >>> _gb(27_340_000), _gb(1.75e9), _gb(143.7e9)
    ('0.027', '1.8', '144')
    """
    return f"{amount / 1e9:.2g}" if amount < 10e9 else f"{amount / 1e9:.0f}"


def _count(parameters: int) -> str:
    """Return a number of weights, in millions where there are any.

    >>> _count(109_518_527), _count(35_856)
    ('109.5 M', '36 k')
    """
    return f"{parameters / 1e6:.1f} M" if parameters >= 100_000 else f"{parameters / 1e3:.0f} k"
