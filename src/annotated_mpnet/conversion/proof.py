"""The proof of an export: open it as its user will, run both networks, compare.

`AutoModelForMaskedLM` opens the directory from the disk and runs a random batch; our network,
rebuilt from the very tensors that were to be written, runs the same through `encode` and `lm_head`.
The sentences have several lengths, padded, so masks count; the longest has 160 tokens, which
reaches the last bucket of relative positions, and ids come from the whole vocabulary:

    sentence 0   160 tokens
    sentence 1   106 tokens   54 padding
    sentence 2    53 tokens  107 padding
    sentence 3     1 token   159 padding

Rounding alone makes a difference of less than 1e-5 in a logit, because the two programs add the
same numbers in another order. Over 1e-4 the export fails. Measured with one layer as wide as
MPNet-base's and fresh weights:

    exported with                                   largest difference of a logit
    ----------------------------------------------  -----------------------------
    positions that start a row too late                  2.4
    q and v swapped                                      0.7
    q and k swapped                                      0.05
    no relative position bias                            0.002
    eps 1e-12 instead of 1e-5                            0.0005
    nothing wrong                                   less than 0.00001

**What it cannot see** is what makes no difference yet: in a fresh network all norms are ones and
zeros, so two swapped norms are the same network. That is why the list of reasons, the table of
names and the check of shapes stay. The proof grows stronger with training, which moves weights
apart: it shows most where a mistake costs most.

Logits at padded positions are not compared: neither program promises anything about them. It costs
both networks in memory at once (0.9 GB for MPNet-base). The tokenizer is opened again too, and
compared in `vocabulary.py`.

    B batch   L tokens of a sentence   V vocabulary
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM
from transformers.utils import logging as transformers_logging

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

TOLERANCE = 1e-4
"""Largest difference of a logit between the two networks, in float32."""
PROBE_LENGTH = 160
"""Tokens of the longest sentence: beyond distance 91 all relative positions are alike."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports off the console within the block."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def compare_logits(directory: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a logit at a real position of a random batch.

    Args:
        directory: the export, perhaps still under a temporary name.
        config: our network's.
        tensors: our network's state, under our names; not changed.

    Raises:
        CheckpointError: the difference is more than `TOLERANCE`, or NaN.
    """
    theirs = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    # Built without data and filled by assignment: nothing is drawn from the random generator.
    with torch.device("meta"):
        ours = MPNetForPretraining(config)
    ours.load_state_dict(tensors, assign=True)
    ours.eval()
    input_ids, attention_mask = probe_batch(config)
    with torch.no_grad():
        our_logits_BLV = ours.logits(ours.encode(input_ids, attention_mask))
        their_logits_BLV = theirs(input_ids=input_ids, attention_mask=attention_mask).logits
    difference_BLV = (our_logits_BLV - their_logits_BLV).abs()
    difference = float(difference_BLV[attention_mask != 0].max())
    if not difference <= TOLERANCE:  # NaN fails too
        raise CheckpointError(
            f"the exported model's logits differ from the original's by {difference:.2g}, more "
            f"than {TOLERANCE:g}: it would be another network. Nothing was left behind; check the "
            "installed version of transformers, and whether the weights have diverged"
        )
    return difference


def probe_batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return random ids (B, L), padded on the right, and their attention mask (B, L).

    The same for the same configuration, so a failure can be looked into.

    >>> probe_batch(ModelConfig())[1].sum(dim=1).tolist()
    [160, 106, 53, 1]
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(config.max_positions, PROBE_LENGTH)
    length_B = torch.tensor([longest, longest * 2 // 3, longest // 3, 1]).clamp(min=1)
    real_BL = torch.arange(longest) < length_B[:, None]
    ids_BL = torch.randint(0, config.vocab_size - 1, real_BL.shape, generator=generator)
    # Never the padding id. HF: positions count the ids that are not padding, whatever the attention
    # mask says, so a padding id within a sentence would shift all that follows; ours go by the
    # mask.
    ids_BL += ids_BL >= config.pad_token_id
    return torch.where(real_BL, ids_BL, config.pad_token_id), real_BL.long()
