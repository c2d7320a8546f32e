"""Our weights as a Hugging Face model: written, proved (`proof.py`), and only then published.

What is written:

    model.safetensors       the tensors in float32, under Hugging Face's names
    config.json             what MPNetConfig needs, eps and padding id spelled out
    tokenizer.json, ...     so that the directory is enough, offline
    pytorch_model.bin       on request, for readers that know no safetensors

**All or nothing.** Everything happens in a sibling `.tmp-NAME`; a rename publishes it. A process
that is killed leaves at most that directory, which the next export removes. Where an older export
is replaced, it steps aside to `.old-NAME` (and is found there by whoever was killed between the two
renames): at no time is there a mixture.

**Length.** A network with `max_positions` 512 takes 512 tokens, `<s>` and `</s>` included, and that
is the tokenizer's `model_max_length`. `max_position_embeddings` is 514, because the table begins
with two rows that belong to no position; taken for a length, it would lead two tokens too far.

Next: `proof.py`.
"""

import copy
import dataclasses
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import MPNetConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from annotated_mpnet.config import ModelConfig
from annotated_mpnet.conversion.names import reasons_not_representable, to_hugging_face
from annotated_mpnet.conversion.proof import (
    compare_logits,
    compare_tokenizers,
    quiet_transformers,
)
from annotated_mpnet.errors import ConfigError, WriteError
from annotated_mpnet.modeling import MPNetForPretraining

LARGEST_PADDING = 128
"""Vocabularies are padded to a multiple of 8, 64 or 128 for the sake of matrix kernels. More rows
than that without a token are no padding, but another tokenizer's."""


@dataclass(frozen=True)
class ExportReport:
    """What an export has proved and left behind.

    Attributes:
        directory: where the model is.
        files: what is in it, sorted.
        max_difference: the largest difference of a logit between the two networks.
        vocabulary_cut: rows of the embedding that stood for no token and were left out.
    """

    directory: Path
    files: tuple[Path, ...]
    max_difference: float
    vocabulary_cut: int


def export_to_hugging_face(
    model: MPNetForPretraining,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    pytorch_bin: bool = False,
    save_tokenizer: bool = True,
) -> ExportReport:
    """Write a model as Hugging Face's `MPNetForMaskedLM`, and prove that it is the same network.

    Args:
        model: on any device, in any mode; it is not changed.
        directory: where to; absent or empty, unless `overwrite`.
        tokenizer: the model's. It tells the ids of `<s>` and `</s>`, and how many rows of a padded
            vocabulary are tokens. None: 0, 2 and all.
        overwrite: replace an older Hugging Face model there.
        pytorch_bin: write `pytorch_model.bin` too.
        save_tokenizer: write the tokenizer too, without truncation and padding.

    Raises:
        ConfigError: Hugging Face cannot represent the network (all reasons are named), the
            tokenizer is not the model's, or the directory is in use. Nothing was written.
        CheckpointError: the export does not do what the model does. Nothing was left behind.
        WriteError: full disk, lost permission. Nothing was left behind.
    """
    reasons = reasons_not_representable(model.config) + _tokenizer_reasons(model.config, tokenizer)
    if reasons:
        raise ConfigError(
            f"Hugging Face's MPNet cannot be this model: {'; '.join(reasons)}; nothing was "
            "written. Train with what it can represent, or use the checkpoint as it is"
        )
    target = directory.resolve()
    with _writing(target):
        _check_target(target, overwrite)
    config, tensors = _without_padded_vocabulary(model, tokenizer)
    with _staging(target) as staging, quiet_transformers():
        with _writing(target):
            _write(staging, tensors)
            _hugging_face_config(config, tokenizer).save_pretrained(staging)
            if pytorch_bin:
                _write_pytorch_bin(staging, tensors)
            if tokenizer is not None and save_tokenizer:
                _untruncated(tokenizer, config.max_positions).save_pretrained(staging)
        difference = compare_logits(staging, config, tensors)
        if tokenizer is not None and save_tokenizer:
            compare_tokenizers(staging, tokenizer)
        with _writing(target):
            _publish(staging, target)
    return ExportReport(
        directory=directory,
        files=tuple(directory / path.name for path in sorted(target.iterdir())),
        max_difference=difference,
        vocabulary_cut=model.config.vocab_size - config.vocab_size,
    )


def number_of_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the size of the table that a tokenizer needs: its largest id, plus one.

    Neither `vocab_size` (without added tokens) nor `len` (too small if ids were left out) is that.
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def _tokenizer_reasons(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if tokenizer is None:
        return []
    reasons = []
    size, rows = number_of_ids(tokenizer), config.vocab_size
    if not size <= rows < size + LARGEST_PADDING:
        reasons.append(f"the tokenizer has {size} ids and the model {rows}: not its own tokenizer")
    if tokenizer.pad_token_id != config.pad_token_id:
        reasons.append(
            f"the tokenizer's padding id is {tokenizer.pad_token_id}, the model's "
            f"{config.pad_token_id}"
        )
    return reasons


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; expected a directory: choose another name")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{target} is not empty; nothing was written. Choose another directory, or replace "
            "what is there with --overwrite"
        )
    # Replacing deletes whatever is there. A slip of the hand must not cost a home directory.
    if not (target / "config.json").is_file() or (target / "manifest.json").exists():
        raise ConfigError(
            f"{target} holds something other than a Hugging Face model, which --overwrite would "
            "delete; choose another directory, or empty it yourself"
        )


def _without_padded_vocabulary(
    model: MPNetForPretraining, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the network on the CPU, in float32, with a row for each token and no more."""
    tensors = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    size = model.config.vocab_size if tokenizer is None else number_of_ids(tokenizer)
    for name in ("sentence_encoder.embed_tokens.weight", "lm_head.bias"):
        tensors[name] = tensors[name][:size]
    return dataclasses.replace(model.config, vocab_size=size), tensors


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Make the directory in which an export comes to be, and leave nothing of it in an error."""
    staging = target.with_name(f".tmp-{target.name}")
    with _writing(target):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn a failed write into a `WriteError`.

    tokenizers writes in Rust, and says what went wrong only in the text of a bare `Exception`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise WriteError(
            f"{target} could not be written: {repr(str(error))[:80]}; nothing was left behind. "
            "Make room or mend that, or choose another directory"
        ) from error


def _write(staging: Path, tensors: Mapping[str, Tensor]) -> None:
    # Through bytes rather than `save_file`, whose files nobody but their owner may read.
    # transformers refuses files that do not say "pt".
    theirs = {name: each.contiguous() for name, each in to_hugging_face(tensors).items()}
    data = safetensors.torch.save(theirs, metadata={"format": "pt"})
    (staging / "model.safetensors").write_bytes(data)


def _hugging_face_config(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None
) -> MPNetConfig:
    return MPNetConfig(
        architectures=["MPNetForMaskedLM"],
        dtype="float32",
        vocab_size=config.vocab_size,
        hidden_size=config.encoder_embed_dim,
        num_hidden_layers=config.encoder_layers,
        num_attention_heads=config.encoder_attention_heads,
        intermediate_size=config.encoder_ffn_dim,
        hidden_act=config.activation_fn,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        max_position_embeddings=config.max_positions + config.pad_token_id + 1,
        layer_norm_eps=config.layer_norm_eps,
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        pad_token_id=config.pad_token_id,
        bos_token_id=_first_id(tokenizer, ("bos_token", "cls_token"), 0),
        eos_token_id=_first_id(tokenizer, ("eos_token", "sep_token"), 2),
    )


def _first_id(
    tokenizer: PreTrainedTokenizerBase | None, purposes: tuple[str, ...], default: int
) -> int:
    """Return the id of the first of these special tokens that the tokenizer has."""
    if tokenizer is None:
        return default
    tokens = [tokenizer.special_tokens_map.get(purpose) for purpose in purposes]
    ids = [tokenizer.get_vocab().get(str(token)) for token in tokens]
    return next((each for each in ids if each is not None), default)


def _untruncated(tokenizer: PreTrainedTokenizerBase, max_positions: int) -> PreTrainedTokenizerBase:
    """Return a copy that cuts and pads only when it is asked to.

    `tokenizer.json` of all-mpnet-base-v2 has both switched on, at 128 tokens: who trains on what it
    returns throws away the rest of each text without a word.
    """
    plain = copy.deepcopy(tokenizer)
    plain.model_max_length = max_positions
    if isinstance(plain, PreTrainedTokenizerFast):
        plain.backend_tokenizer.no_truncation()
        plain.backend_tokenizer.no_padding()
    for setting in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        plain.init_kwargs.pop(setting, None)
    return plain


def _write_pytorch_bin(staging: Path, tensors: Mapping[str, Tensor]) -> None:
    # Old readers know no tying by omission: they want the decoder's weight and bias by name.
    theirs = {name: each.clone() for name, each in to_hugging_face(tensors).items()}
    theirs["lm_head.decoder.weight"] = theirs["mpnet.embeddings.word_embeddings.weight"]
    theirs["lm_head.decoder.bias"] = theirs["lm_head.bias"]
    buffer = io.BytesIO()
    torch.save(theirs, buffer)
    (staging / "pytorch_model.bin").write_bytes(buffer.getbuffer())


def _publish(staging: Path, target: Path) -> None:
    # On the disk before it has its name: after a power cut, a name without contents would look
    # like an export.
    for path in (*staging.iterdir(), staging):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    former = target.with_name(f".old-{target.name}")
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
    try:
        os.rename(staging, target)
    except OSError:
        if former.exists():
            os.rename(former, target)
        raise
    shutil.rmtree(former, ignore_errors=True)
