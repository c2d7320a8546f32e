"""Decisions before the first update, each from the settings and one other thing.

    choose_device, choose_attention     the machine    where, and in which numbers?
    choose_recording                    the machine    kernel by kernel, or in one go?
    identity_of                         the text       which run is this?
    measure_plateau                     the text       what does guessing by frequency reach?

**An identity** is what decides the batches. Two runs with the same identity see the same sequences
with the same masks in update 1000, so one can continue the other. Learning rate and dropout are not
in it: they change what is done with a batch, which a resumed run may want to change.

**bfloat16** has float32's exponent, so nothing overflows that did not before, but 8 instead of 24
bits of precision: 256 + 1 is 256. So only the factors of matrix products are rounded to it, whose
terms a GPU adds in float32. Weights, means, norms and losses stay in float32. float16 would need a
loss scale to keep small gradients from becoming 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.fast.attention import AttentionName
from annotated_mpnet.fast.recording import RecordedStep
from annotated_mpnet.mpnet.batch import Batch
from annotated_mpnet.mpnet.loop import Setup, add_gradient
from annotated_mpnet.runs.texts import Text
from annotated_mpnet.settings.config import Attention, MachineConfig, PretrainingConfig
from annotated_mpnet.text.frequencies import (
    token_counts,
    unigram_accuracy,
    unigram_bits,
)
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.text.tokenizer import tokenizer_hash
from annotated_mpnet.training.distributed import World

AddGradient = Callable[[Setup, Batch, int], Tensor]

DIFFERS = "the last bits differ each time, so a resumed run is not byte-identical"


@dataclass(frozen=True)
class Plateau:
    """What guessing by frequency reaches on the validation text (`text/frequencies.py`).

    Attributes:
        bits: per predicted token.
        accuracy: of always guessing the most frequent token.
        train_bits: `bits` on the training text; the same as `bits` for a stream.
    """

    bits: float
    accuracy: float
    train_bits: float


def choose_device(machine: MachineConfig, world: World) -> tuple[torch.device, bool]:
    """Return the device to train on, and whether matrix products run in bfloat16 there.

    With --precision auto, only a GPU computes in bfloat16: few CPUs gain by it.

    >>> for precision in ("auto", "fp32", "bf16"):
    ...     machine = MachineConfig(device="cpu", precision=precision)
    ...     print(*choose_device(machine, World()))
    cpu False
    cpu False
    cpu True

    Raises:
        ConfigError: the device does not exist, or this machine has fewer GPUs than processes.
    """
    # In order of preference. A device asked for by name is never replaced by another.
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = machine.device
    there = [name for name, is_there in available.items() if is_there]
    if wanted != "auto" and wanted not in there:
        raise ConfigError(
            f"--device is {wanted}, which PyTorch does not find here; it has {', '.join(there)}"
        )
    name = there[0] if wanted == "auto" else wanted
    precision = machine.precision
    if name == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {world.local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; start as many with torchrun --nproc-per-node"
            )
        # Some libraries, such as NCCL, allocate on the current GPU.
        torch.cuda.set_device(world.local_rank)
        return torch.device(name, world.local_rank), precision != "fp32"
    return torch.device(name), precision == "bf16"


def choose_attention(
    wanted: Attention, device: torch.device, fault: str | None = None
) -> tuple[AttentionName, str]:
    """Return how to compute attention, and why; all ways agree to rounding.

    >>> choose_attention("auto", torch.device("cpu"))
    ('blocked', 'auto: the fastest on a CPU')
    >>> choose_attention("eager", torch.device("cpu"))
    ('eager', 'asked for')
    >>> choose_attention("auto", torch.device("cuda"))
    ('triton', 'auto: the same bits each time')

    Args:
        wanted: the flag.
        device: to compute on.
        fault: why the Triton kernels cannot be used on it (`fast/kernel_check.py`), if so.

    Raises:
        ConfigError: this device cannot compute it that way.
    """
    on_gpu = device.type == "cuda"
    if wanted == "triton":
        if not on_gpu:
            raise ConfigError(
                f"--attention triton needs a GPU with CUDA, and the device is {device}; leave it "
                "out, or choose blocked (CPU) or sdpa"
            )
        if fault is not None:
            raise ConfigError(
                f"--attention triton cannot be used on {device} ({fault}); leave it out, or "
                "choose sdpa"
            )
    if wanted == "sdpa" and on_gpu:
        return wanted, f"asked for; {DIFFERS}"
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cpu":
        return "blocked", "auto: the fastest on a CPU"
    if on_gpu and fault is None:
        return "triton", "auto: the same bits each time"
    if on_gpu:
        return "sdpa", f"auto: no Triton here ({fault}); {DIFFERS}"
    return "sdpa", "auto: PyTorch's own kernels"


def choose_recording(
    config: PretrainingConfig, device: torch.device, world_size: int
) -> tuple[AddGradient, str | None]:
    """Return how a micro-batch is computed, and on a GPU how that is said in the plan."""
    if device.type != "cuda":
        return add_gradient, None
    obstacles = {
        "--no-cuda-graph": not config.machine.cuda_graph,
        f"--packing {config.data.packing}: shapes vary": config.data.packing != "full",
        "several processes": world_size > 1,
        "--gradient-checkpointing": config.machine.gradient_checkpointing,
        # It looks at each gradient while it is computed, which a replay does not.
        "--wandb-watch": config.tracking.wandb_watch,
    }
    if found := [name for name, is_there in obstacles.items() if is_there]:
        return add_gradient, f"not recorded as a CUDA graph ({', '.join(found)})"
    recorded = RecordedStep(config.optimization.batch_size, config.data.max_tokens)
    return recorded, "recorded as a CUDA graph"


def identity_of(
    config: PretrainingConfig, text: Text, world_size: int
) -> dict[str, str | int | float]:
    """Return what must not change on resume, under the names of `--allow-change`.

    The number of processes matters only for a stream, which is split among them. Of --batch-size,
    --update-freq and processes only the product counts, so a run may move to another machine.
    Text and tokenizer are compared by content: a file may be moved, but not changed.
    """
    objective, optimization = config.objective, config.optimization
    return {
        "data": text.train.fingerprint,
        "tokenizer": tokenizer_hash(text.tokenizer),
        "seed": config.run.seed,
        "batch": optimization.batch_size * optimization.update_freq * world_size,
        "length": config.data.max_tokens,
        "packing": config.data.packing,
        "masking": (
            f"{objective.input_mode}, predicted {objective.pred_prob:g}, kept "
            f"{objective.keep_prob:g}, random {objective.rand_prob:g}, whole words "
            f"{objective.whole_word_mask}{', cut anywhere' * objective.whole_word_mask}"
        ),
        "world-size": "any" if isinstance(text.train, PackedSequences) else world_size,
    }


def measure_plateau(text: Text) -> Plateau | None:
    """Return the unigram plateau of the validation text; None if it cannot be measured.

    The frequencies are those of the training text (`Text.training_counts`).
    """
    if text.valid is None or (train_V := text.training_counts) is None:
        return None
    valid_V = token_counts(text.valid, text.vocabulary.is_special_V)
    bits = unigram_bits(train_V, valid_V)
    train_bits = unigram_bits(train_V, train_V) if isinstance(text.train, PackedSequences) else bits
    return Plateau(bits, unigram_accuracy(train_V, valid_V), train_bits)
