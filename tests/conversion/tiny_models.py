"""Tiny networks and a tiny tokenizer, for the tests of conversion."""

import os
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import MPNetConfig, PreTrainedTokenizerFast

from annotated_mpnet.checkpoints.checkpoint import Checkpoint, TrainState, save_checkpoint
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import write_tokenizer

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
    """What a malicious file holds: a pickle that leaves a trace if anybody loads it."""

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
    """Return a network in which every number matters: biases and norms are random too."""
    model = MPNetForPretraining(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Relative biases are added to scores, so that large ones show in the logits.
            scale = 1.0 if "relative" in name else 0.2
            parameter.normal_(0.0, scale, generator=generator)
    return model


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
    run.mkdir(exist_ok=True, parents=True)
    state = TrainState(
        update=update, tokens_seen=0, predicted_seen=0, best_valid_bits=None, identity={}
    )
    checkpoint = Checkpoint(
        run_id="a run",
        state=state,
        model_config=model.config,
        model_tensors=model.state_dict(),
        optimizer_tensors=None,
    )
    return save_checkpoint(run, name, checkpoint, partial(write_tokenizer, tiny_tokenizer()))
