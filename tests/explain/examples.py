"""Sentences and a tiny model, for the tests of `explain-mpnet`."""

from dataclasses import replace
from functools import cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.explain.explanation import Explanation, explain
from annotated_mpnet.explain.model import Asked
from annotated_mpnet.explain.sentence import word_tokenizer
from annotated_mpnet.mpnet.config import InputMode, ModelConfig, ObjectiveConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import vocabulary_of
from networks import scrambled

SENTENCE = "The cat sat on the mat, and the other cat looked at it from the new chair."
NASTY = (
    "</script><!-- <script>alert(1)\u2028\"'&amp; $x$ \u202e שלום עולם 👩‍🚀 \x1b[2J <mask> C:\\new"
)
MODES: tuple[InputMode, ...] = ("mpnet", "mlm", "plm")


def explained(text: str = SENTENCE, mode: InputMode = "mpnet", **options: object) -> Explanation:
    """Explain a sentence with `word_tokenizer`; a third of the tokens are predicted."""
    settings = ObjectiveConfig(input_mode=mode, pred_prob=0.3)
    return explain(text, word_tokenizer(text), settings, **options)  # type: ignore[arg-type]


def tiny_asked(
    tokenizer: PreTrainedTokenizerFast, *, has_head: bool = True, **numbers: int
) -> Asked:
    """Return a model in which every number matters; some may be given."""
    vocabulary = vocabulary_of(tokenizer)
    config = ModelConfig(
        vocab_size=vocabulary.size,
        pad_token_id=vocabulary.pad_id,
        mask_token_id=vocabulary.mask_id,
        encoder_layers=3,
        encoder_embed_dim=16,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        max_positions=40,
    )
    model = scrambled(MPNetForPretraining(replace(config, **numbers))).eval()
    return Asked(model, has_head, tokenizer, "its own", ())


def explained_by_a_model(mode: InputMode = "mpnet", *, has_head: bool = True) -> Explanation:
    """Explain `SENTENCE` with the tiny model."""
    return replace(_explained_by_a_model(has_head), input_mode=mode)


@cache
def _explained_by_a_model(has_head: bool) -> Explanation:
    asked = tiny_asked(word_tokenizer(SENTENCE), has_head=has_head)
    return explained(asked=asked)


def with_specials(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a vocabulary that has the five special tokens."""
    names = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
