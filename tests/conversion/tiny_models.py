"""Tiny networks and a tiny tokenizer, for the tests of conversion."""

import os
import string
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import MPNetConfig, PreTrainedTokenizerFast

from annotated_mpnet import cli
from annotated_mpnet.conversion import ExportReport, convert_checkpoint
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import write_tokenizer
from networks import save_network, scrambled

# In MPNet's order: four special tokens first, the mask last, and a second, useful [UNK].
PIECES = [
    *("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "the", "##ing", ",", "."),
    *string.ascii_lowercase,
    *(f"##{letter}" for letter in string.ascii_lowercase),
    "<mask>",
]
VOCAB_SIZE = len(PIECES)
MAX_POSITIONS = 40


class LeavesTrace:
    """What a malicious file holds: a pickle that leaves a trace when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer(lowercase=True)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="[UNK]",
        pad_token="<pad>",
        mask_token="<mask>",
    )


def tiny_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "encoder_layers": 2,
        "encoder_embed_dim": 16,
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "max_positions": MAX_POSITIONS,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def tiny_model(config: ModelConfig | None = None, seed: int = 0) -> MPNetForPretraining:
    return scrambled(MPNetForPretraining(config or tiny_config()), seed)


def hugging_face_config(**changes: object) -> MPNetConfig:
    values: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": MAX_POSITIONS + 2,
        "layer_norm_eps": 1e-5,
    }
    return MPNetConfig(**{**values, **changes})


def padded_batch(vocab_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (B, L) and attention mask (B, L): whole, padded right, padded left, one token."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, length, dtype=torch.int64)
    mask[1, length // 2 :] = 0
    mask[2, : length // 3] = 0
    mask[3, 1:] = 0
    ids = torch.randint(2, vocab_size, (4, length), generator=generator)
    return torch.where(mask == 1, ids, 1), mask


def save_tiny_checkpoint(run: Path, update: int, name: str, model: MPNetForPretraining) -> Path:
    return save_network(run, update, name, model, partial(write_tokenizer, tiny_tokenizer()))


def converted(source: Path, target: Path, **changes: bool) -> ExportReport:
    """Convert as `convert-to-hf` does by default, except for the changes."""
    flags = {"save_tokenizer": True, "overwrite": False, "pytorch_bin": False, **changes}
    return convert_checkpoint(source, target, **flags)


def convert_to_hf(source: Path, target: Path, *flags: str) -> int | str | None:
    """Run the command in this process; return its exit code."""
    paths = ("--mpnet-checkpoint-path", str(source), "--hf-model-folder-path", str(target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert-to-hf", *paths, *flags])
        with pytest.raises(SystemExit) as ending:
            cli.convert()
    return ending.value.code
