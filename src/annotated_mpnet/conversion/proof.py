"""The proof of an export: open it as its user will, ask both networks, compare.

The directory is opened with `AutoModelForMaskedLM`, from the disk, and asked a random batch; our
network, rebuilt from the very tensors that were to be written, is asked the same through `encode`
and `lm_head`. The batch has rows of several lengths, padded, so that masks count; the longest has
160 tokens, which reaches the last bucket of relative positions, and its ids are drawn from the
whole vocabulary, without padding:

    row 0   160 tokens
    row 1   106 tokens   54 padding
    row 2    53 tokens  107 padding
    row 3     1 token   159 padding

The largest difference of any logit is reported. Rounding alone makes less than 1e-5 of it: the two
programs add the same numbers in another order. Over 1e-4 the export fails. Logits at padded
positions are left out: nobody reads them, and what stands there is nobody's promise.

A wrong name, a lost offset, eps, bucket or activation changes every logit. That is why this stands
beside the list of reasons: what nobody thought of is found as well.

The tokenizer is opened again too. It must have the same vocabulary, and give some difficult texts
the same ids as before: a class that rebuilds its normalizer from its name instead of from its file
would not.

Next: `hugging_face.py`, the way back.

    B batch   L tokens of a sentence   V vocabulary
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from annotated_mpnet.config import ModelConfig
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.modeling import MPNetForPretraining

TOLERANCE = 1e-4
"""Largest difference of a logit between the two networks, in float32."""
PROBE_LENGTH = 160
"""Tokens of the longest row: beyond distance 91 all relative positions are alike."""
PROBE_TEXTS = (
    "MPNet sees each position once: as a token, or as a mask.",
    "Don't PANIC -- it's only naïve Straße №5, 東京 and 🙂\tin one line.",
    "",
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports off the console, for a while."""
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

    Raises:
        CheckpointError: it is more than `TOLERANCE`, or no number.
    """
    theirs = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    # Built without data and filled by assignment: no weights are drawn, so that the generator that
    # training uses stays where it is.
    with torch.device("meta"):
        ours = MPNetForPretraining(config)
    ours.load_state_dict(tensors, assign=True)
    ours.eval()
    input_ids, attention_mask = probe_batch(config)
    with torch.no_grad():
        our_logits_BLV = ours.lm_head(ours.encode(input_ids, attention_mask))
        their_logits_BLV = theirs(input_ids=input_ids, attention_mask=attention_mask).logits
    difference_BLV = (our_logits_BLV - their_logits_BLV).abs()
    difference = float(difference_BLV[attention_mask != 0].max())
    # Written so that NaN fails: no comparison with it is true.
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the exported model's logits differ from the original's by {difference:.2g}, more "
            f"than {TOLERANCE:g}: it would be another network. Nothing was left behind; check the "
            "installed version of transformers, and whether the weights have diverged"
        )
    return difference


def probe_batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return random ids (B, L), padded on the right, and their attention mask (B, L).

    >>> probe_batch(ModelConfig())[1].sum(dim=1).tolist()
    [160, 106, 53, 1]
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(config.max_positions, PROBE_LENGTH)
    length_B = torch.tensor([longest, longest * 2 // 3, longest // 3, 1]).clamp(min=1)
    real_BL = torch.arange(longest) < length_B[:, None]
    ids_BL = torch.randint(0, config.vocab_size - 1, real_BL.shape, generator=generator)
    ids_BL += ids_BL >= config.pad_token_id  # any id but that of padding
    return torch.where(real_BL, ids_BL, config.pad_token_id), real_BL.long()


def compare_tokenizers(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `CheckpointError` if a saved tokenizer is not what it was before."""
    opened = AutoTokenizer.from_pretrained(directory)
    original = copy.deepcopy(tokenizer)
    texts = [*PROBE_TEXTS, f"a {tokenizer.mask_token} b"]
    same = opened.get_vocab() == original.get_vocab() and all(
        opened(text)["input_ids"] == original(text)["input_ids"] for text in texts
    )
    if not same:
        raise CheckpointError(
            f"the tokenizer, a {type(tokenizer).__name__}, gives other ids when it is saved and "
            "opened again; nothing was left behind. Export without it (--no-save-tokenizer), or "
            "train with a PreTrainedTokenizerFast"
        )
