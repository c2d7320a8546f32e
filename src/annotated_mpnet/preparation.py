"""What a run needs before its first update: a device, an identity, a plateau to be judged by.

The order is that of what can go wrong: cheap checks come before expensive ones. All text is found
(`data/texts.py`) before a network is built (`initial_weights.py`).

Next: `run.py`, which puts these together.
"""

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

    Attributes:
        bits: per predicted token.
        accuracy: of always guessing the most frequent token.
    """

    bits: float
    accuracy: float


def choose_device(config: PretrainingConfig, world: World) -> tuple[torch.device, bool]:
    """Return the device to train on, and whether matrix products run in bfloat16 there.

    bfloat16 has the range of float32 with 8 instead of 24 bits of precision: no loss scaling is
    needed, as with float16, and a GPU computes products several times faster. A CPU stays with
    float32 unless told otherwise: few CPUs gain by it, and exactness is worth more there.

    Of several GPUs, each process of a machine takes the one of its number.

    Raises:
        ConfigError: the device that was asked for is not there, or there are too few.
    """
    # In the order of preference.
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
        torch.cuda.set_device(world.local_rank)
        return torch.device(name, world.local_rank), precision != "fp32"
    return torch.device(name), precision == "bf16"


def choose_attention(wanted: Attention, device: torch.device) -> tuple[AttentionName, str]:
    """Return the way to compute attention, and why.

    >>> choose_attention("auto", torch.device("cpu"))
    ('blocked', 'auto: the fastest on a CPU')
    """
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cpu":
        return "blocked", "auto: the fastest on a CPU"
    return "sdpa", "auto: PyTorch's own kernels"


def identity_of(
    config: PretrainingConfig, text: Text, world_size: int
) -> dict[str, str | int | float]:
    """Return what must be the same when a run is resumed, under the names of `--allow-change`.

    The number of processes only where it matters: a stream is read in as many shares, while text on
    the disk makes the same batches for any number of them, as long as an update has as many rows.
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
    """Return the unigram plateau of the validation text, if there is one."""
    train_V = text.training_counts
    if text.valid is None or train_V is None:
        return None
    valid_V = token_counts(text.valid, text.vocabulary.is_special_V)
    return Plateau(unigram_bits(train_V, valid_V), unigram_accuracy(train_V, valid_V))
