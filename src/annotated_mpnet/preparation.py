"""What a run needs before its first update: a device, an identity, a plateau to be judged by.

The order is that of what can go wrong: cheap checks come before expensive ones. All text is found
(`data/texts.py`) before a network is built (`initial_weights.py`).

Three questions are answered here, each by looking at the settings and at one other thing:

    where, and in which numbers?     the machine    choose_device, choose_attention
    which run is this?               the text       identity_of
    what would be no achievement?    the text       measure_plateau

**An identity** is what decides the batches. Of two runs with the same identity, update 1000 has
seen the same rows with the same masks; so one of them may go on where the other has stopped. That
is why learning rate and dropout are not in it, though they change the result: they say what is done
with a batch, and another value for the second half of a run may be what one wants.

**bfloat16** is float32 cut in half: the same 8 bits for the exponent, so that nothing overflows
that did not before, and 8 instead of 24 bits for the digits.

>>> [torch.finfo(kind).max for kind in (torch.float32, torch.bfloat16, torch.float16)]
[3.4028234663852886e+38, 3.3895313892515355e+38, 65504.0]
>>> torch.tensor([255.0, 256.0, 257.0, 258.0], dtype=torch.bfloat16).tolist()
[255.0, 256.0, 256.0, 258.0]

With float16, whose range ends early at both ends, small gradients become 0 unless the loss is
multiplied by a large number, which must be found and kept up to date. Here there is no such number,
and one thing less to save. But no sum of many terms can be made in it: 256 + 1 is 256. So weights,
means, norms and losses stay in float32, and only factors of matrix products are rounded, whose
terms a GPU adds up in float32 as well (`training/trainer.py`).

Next: `run.py`, which puts these together.

    V vocabulary
"""

import importlib.util
from dataclasses import dataclass

import torch

from annotated_mpnet.config import Attention, PretrainingConfig
from annotated_mpnet.data import PackedRows, tokenizer_hash
from annotated_mpnet.data.statistics import (
    token_counts,
    unigram_accuracy,
    unigram_bits,
)
from annotated_mpnet.data.texts import Text
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.modeling.attention import AttentionName
from annotated_mpnet.training.distributed import World


@dataclass(frozen=True)
class Plateau:
    """What guessing by frequency reaches on the validation text (`data/statistics.py`).

    The two numbers of an `Evaluation`, of a model without a network.

    Attributes:
        bits: per predicted token.
        accuracy: of always guessing the most frequent token.
        train_bits: the same on the training text, which the frequencies are from, so it is a little
            lower. (That of a stream is not known before it is read; `bits` takes its place.)
    """

    bits: float
    accuracy: float
    train_bits: float


def choose_device(config: PretrainingConfig, world: World) -> tuple[torch.device, bool]:
    """Return the device to train on, and whether matrix products run in bfloat16 there.

    With `--precision auto` a GPU computes products in bfloat16, several times faster. A CPU stays
    with float32 unless told otherwise: few CPUs gain by it, and exactness is worth more there.

    >>> from annotated_mpnet.config import MachineConfig
    >>> for precision in ("auto", "fp32", "bf16"):
    ...     machine = MachineConfig(device="cpu", precision=precision)
    ...     print(*choose_device(PretrainingConfig(machine=machine), World()))
    cpu False
    cpu False
    cpu True

    Of several GPUs, each process of a machine takes the one of its number. Two processes on one GPU
    would work, at half the speed each, and nobody would know why; NCCL refuses them late, and in
    its own words.

    Args:
        config: `device` and `precision` are looked at.
        world: says which process of its machine this is.

    Raises:
        ConfigError: the device that was asked for is not there, or there are too few.
    """
    # In the order of preference. What was asked for by name is taken or refused, never replaced: a
    # run on a CPU that was meant for a GPU would go on for days before somebody looked.
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    wanted = config.machine.device
    if wanted == "auto":
        name = next(name for name, there in available.items() if there)
    elif available[wanted]:
        name = wanted
    else:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(f"--device is {wanted}, which PyTorch does not find here; it has {there}")
    precision = config.machine.precision
    if name == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {world.local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; start as many with torchrun --nproc-per-node"
            )
        # Also for what allocates on "the" GPU without saying which, NCCL's buffers for one.
        torch.cuda.set_device(world.local_rank)
        return torch.device(name, world.local_rank), precision != "fp32"
    return torch.device(name), precision == "bf16"


def choose_attention(wanted: Attention, device: torch.device) -> tuple[AttentionName, str]:
    """Return the way to compute attention, and why.

    All ways give the same numbers to rounding (`modeling/attention.py`). The reason goes into the
    plan, where a choice that nobody made should be seen.

    >>> choose_attention("auto", torch.device("cpu"))
    ('blocked', 'auto: the fastest on a CPU')
    >>> choose_attention("eager", torch.device("cpu"))
    ('eager', 'asked for')

    Raises:
        ConfigError: it cannot be computed so on this device.
    """
    if wanted == "triton":
        _refuse_without_triton(device)
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cpu":
        return "blocked", "auto: the fastest on a CPU"
    if device.type == "cuda":
        return "sdpa", "auto: PyTorch's own kernels; only triton repeats to the bit here"
    return "sdpa", "auto: PyTorch's own kernels"


def _refuse_without_triton(device: torch.device) -> None:
    """Raise a `ConfigError` where Triton's kernels could not be compiled."""
    if device.type != "cuda":
        raise ConfigError(
            f"--attention triton needs a GPU with CUDA, and the device is {device}; leave it out, "
            "or choose blocked (CPU) or sdpa"
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("--attention triton needs Triton, which is missing: pip install triton")


def identity_of(
    config: PretrainingConfig, text: Text, world_size: int
) -> dict[str, str | int | float]:
    """Return what must be the same when a run is resumed, under the names of `--allow-change`.

    The number of processes only where it matters: a stream is read in as many shares, while text on
    the disk makes the same batches for any number of them, as long as an update has as many rows.
    So of `--batch-size`, `--update-freq` and processes the product is kept, and a run may move:

    >>> {"one GPU": 32 * 8 * 1, "eight of them": 32 * 1 * 8, "a smaller one": 4 * 64 * 1}
    {'one GPU': 256, 'eight of them': 256, 'a smaller one': 256}

    Text and tokenizer are known by hashes of what is in them: a file may be moved or renamed, but
    not changed.

    Args:
        config: all settings.
        text: of this rank.
        world_size: processes.

    Returns:
        Values that JSON can hold, to be written into each checkpoint (`training/resume.py` compares
        them). None of them is long: they are shown to the user if they differ.
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
            f"{objective.whole_word_mask}"
        ),
        "world-size": "any" if isinstance(text.train, PackedRows) else world_size,
    }


def measure_plateau(text: Text) -> Plateau | None:
    """Return the unigram plateau of the validation text, if there is one.

    Frequencies are those of the training text, since a guesser may have read no other. A stream has
    not been read yet, and has none; guessing by the frequencies of the validation text itself would
    be guessing with the answers at hand.
    """
    train_V = text.training_counts
    if text.valid is None or train_V is None:
        return None
    valid_V = token_counts(text.valid, text.vocabulary.is_special_V)
    bits = unigram_bits(train_V, valid_V)
    train_bits = unigram_bits(train_V, train_V) if isinstance(text.train, PackedRows) else bits
    return Plateau(bits, unigram_accuracy(train_V, valid_V), train_bits)
