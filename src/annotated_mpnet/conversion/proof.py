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
programs add the same numbers in another order. Over 1e-4 the export fails. What lies between the
two, measured with a layer as wide as MPNet-base's and fresh weights, of which nothing has been
trained yet:

    exported with                                   largest difference of a logit
    ----------------------------------------------  -----------------------------
    positions that start a row too late                  2.4
    q and v in each other's place                        0.7
    q and k in each other's place                        0.05
    a relative position bias that got lost               0.002
    eps 1e-12 instead of 1e-5                            0.0005
    nothing wrong                                   less than 0.00001

**What it cannot see** is what makes no difference yet. In a fresh network all norms are ones and
zeros, so that two norms in each other's place are the same network, today; the proof finds them
after a few updates. That is why it stands beside the list of reasons, the table of names and the
check of every shape, and does not replace them; and they do not replace it, since it finds what
nobody thought of. Its strength grows with training, which moves weights away from zero and from
each other: where a mistake would cost most, it shows most.

Logits at padded positions are left out: nobody reads them, and what stands there is nobody's
promise.

The tokenizer is opened again too. It must have the same vocabulary, and give some difficult texts
the same ids as before: a class that rebuilds its normalizer from its name instead of from its file
would not.

The price: both networks in memory at once (0.9 GB for MPNet-base), and 640 tokens through each.

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

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

TOLERANCE = 1e-4
"""Largest difference of a logit between the two networks, in float32."""
PROBE_LENGTH = 160
"""Tokens of the longest row: beyond distance 91 all relative positions are alike."""
# Case, punctuation, a contraction, accents, an eszett, digits, another script, an emoji, a tab;
# nothing at all; and, added below, the mask, which must stay one token.
PROBE_TEXTS = (
    "MPNet sees each position once: as a token, or as a mask.",
    "Don't PANIC -- it's only naïve Straße №5, 東京 and 🙂\tin one line.",
    "",
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports off the console, for a while.

    They belong to the whole process. Whoever uses this project as a library has settings of his
    own, and finds them as they were.
    """
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
        directory: what was written. It may still have a temporary name.
        config: our network's numbers.
        tensors: our network's state, under our names; it is not changed.

    Raises:
        CheckpointError: it is more than `TOLERANCE`, or no number.
    """
    # `eval` on both: dropout would make each pass another network. float32 on both: asked for by
    # name, since the default is whatever config.json says.
    theirs = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    # Built without data and filled by assignment: no weights are drawn, so that the generator that
    # training uses stays where it is.
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

    The same ones for the same configuration, so that a failure can be looked into.

    >>> probe_batch(ModelConfig())[1].sum(dim=1).tolist()
    [160, 106, 53, 1]
    """
    generator = torch.Generator().manual_seed(0)
    longest = min(config.max_positions, PROBE_LENGTH)
    length_B = torch.tensor([longest, longest * 2 // 3, longest // 3, 1]).clamp(min=1)
    real_BL = torch.arange(longest) < length_B[:, None]
    ids_BL = torch.randint(0, config.vocab_size - 1, real_BL.shape, generator=generator)
    # Any id but that of padding: drawn from one fewer, and moved up from there on. HF: positions
    # are counted over the ids that are not padding, whatever the attention mask says, so that a
    # padding id within a sentence would shift all that follows; ours counts by the mask.
    ids_BL += ids_BL >= config.pad_token_id
    return torch.where(real_BL, ids_BL, config.pad_token_id), real_BL.long()


def compare_tokenizers(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a saved tokenizer, opened again, is the one that was saved.

    The vocabulary alone would not show it: whether "Straße" is lower-cased, or "naïve" loses its
    dots, is the normalizer's business, and a tokenizer that differs there gives legal ids, of other
    pieces than the network was trained on.

    Raises:
        CheckpointError: it has another vocabulary, or gives a text other ids.
    """
    opened = AutoTokenizer.from_pretrained(directory)
    # A call may change a fast tokenizer's settings of truncation and padding: so on a copy.
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
