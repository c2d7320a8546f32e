"""Our weights as a Hugging Face model: written, proved (`proof.py`), and only then published.

    model.safetensors       the tensors in float32, under Hugging Face's names
    config.json             what MPNetConfig needs, eps and padding id spelled out
    tokenizer.json, ...     so the directory is enough, offline
    pytorch_model.bin       on request, for readers without safetensors

**All or nothing.** It is built beside its target and renamed when it is proved (`files/atomic.py`).

**Left out**: the optimizer's state, and rows of the embeddings that belong to no token, where the
vocabulary was padded for matrix kernels (30,527 tokens in 30,592 rows, say).

**Length.** The tokenizer's `model_max_length` is `max_positions`, 512 tokens with `<s>` and `</s>`;
not the 514 of `max_position_embeddings`.

**sentence-transformers** opens the directory like any Hugging Face model: it finds no modules.json
and puts a mean over the tokens after the encoder.
"""

import copy
import dataclasses
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from annotated_mpnet.conversion.configuration import reasons_not_representable, to_mpnet_config
from annotated_mpnet.conversion.names import to_hugging_face
from annotated_mpnet.conversion.proof import compare_logits, compare_tokenizers, quiet_transformers
from annotated_mpnet.errors import ConfigError, WriteError
from annotated_mpnet.files.atomic import replacing
from annotated_mpnet.files.output import HUGGING_FACE_MODEL, refuse_to_replace
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import write_tokenizer

LARGEST_PADDING = 128
"""Rows. Vocabularies are padded to a multiple of 8, 64 or 128 for matrix kernels. More rows without
a token than that mean another tokenizer."""


@dataclass(frozen=True)
class ExportReport:
    """What a published export has proved.

    Attributes:
        directory: where the model is.
        files: what is in it, sorted.
        max_difference: the largest difference of a logit between the two networks.
        vocabulary_cut: rows of the embedding that belong to no token and were left out.
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
    overwrite: bool = False,
    pytorch_bin: bool = False,
    save_tokenizer: bool = True,
) -> ExportReport:
    """Write a model as Hugging Face's `MPNetForMaskedLM`, and prove that it is the same network.

    >>> from tempfile import TemporaryDirectory
    >>> config = ModelConfig(vocab_size=99, encoder_embed_dim=24, encoder_ffn_dim=32)
    >>> model = MPNetForPretraining(dataclasses.replace(config, encoder_layers=1))
    >>> with TemporaryDirectory() as folder:
    ...     target = Path(folder) / "hf"
    ...     report = export_to_hugging_face(model, target, tokenizer=None, overwrite=False)
    >>> [file.name for file in report.files], report.max_difference < 1e-5
    (['config.json', 'model.safetensors'], True)

    Args:
        model: on any device, in any mode; not changed.
        directory: the target; absent or empty, unless `overwrite`.
        tokenizer: the model's. It tells the ids of `<s>` and `</s>`, and how many rows of a padded
            vocabulary are tokens. None: 0, 2 and all.
        overwrite: replace an older Hugging Face model there.
        pytorch_bin: also write `pytorch_model.bin`.
        save_tokenizer: also write the tokenizer, without truncation and padding.

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
    bos = _first_id(tokenizer, ("bos_token", "cls_token"), 0)
    eos = _first_id(tokenizer, ("eos_token", "sep_token"), 2)
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        with _writing(target):
            staging = stack.enter_context(replacing(target))
            _write(staging, tensors)
            to_mpnet_config(config, bos, eos).save_pretrained(staging)
            if pytorch_bin:
                _write_pytorch_bin(staging, tensors)
            if tokenizer is not None and save_tokenizer:
                write_tokenizer(_untruncated(tokenizer, config.max_positions), staging)
        difference = compare_logits(staging, config, tensors)
        if tokenizer is not None and save_tokenizer:
            compare_tokenizers(staging, tokenizer)
        with _writing(target):
            stack.close()  # gives the export its name
    return ExportReport(
        directory=directory,
        files=tuple(directory / path.name for path in sorted(target.iterdir())),
        max_difference=difference,
        vocabulary_cut=model.config.vocab_size - config.vocab_size,
    )


def number_of_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the size of the table that a tokenizer needs: its largest id, plus one.

    Neither `vocab_size` (without added tokens) nor `len` (too small if ids were left out) is that.
    Here a table of `len` = 6 rows would end before "a", which is id 7:

    >>> from tokenizers import Tokenizer, models
    >>> words = models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 7}, "<unk>")
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    >>> _ = tokenizer.add_tokens(["b"])
    >>> tokenizer.vocab_size, len(tokenizer), number_of_ids(tokenizer)
    (5, 6, 8)
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def stands_for_no_token(rows: int, size: int) -> bool:
    """Tell whether a table of `rows` is that of a tokenizer of `size` ids, padded.

    A padded table has a round number of rows, and only a few too many. 30,527 rows are not BERT's
    30,522 and five more: the five came first and moved all the others.

    >>> stands_for_no_token(30592, 30527), stands_for_no_token(30527, 30522)
    (True, False)
    """
    return size < rows < size + LARGEST_PADDING and rows % 8 == 0


def _tokenizer_reasons(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Say why a tokenizer cannot be the one that the network was trained with, by its sizes."""
    if tokenizer is None:
        return []
    reasons = []
    size, rows = number_of_ids(tokenizer), config.vocab_size
    if rows != size and not stands_for_no_token(rows, size):
        reasons.append(f"the tokenizer has {size} ids and the model {rows}: not its own tokenizer")
    if tokenizer.pad_token_id != config.pad_token_id:
        reasons.append(
            f"the tokenizer's padding id is {tokenizer.pad_token_id}, the model's "
            f"{config.pad_token_id}"
        )
    return reasons


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that holds anything which the user did not ask to lose."""
    refuse_to_replace(target, HUGGING_FACE_MODEL, overwrite=overwrite)


def _without_padded_vocabulary(
    model: MPNetForPretraining, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the network on the CPU, in float32, with a row for each token and no more.

    fill-mask picks ids from all logits, and could pick a row without a token.
    """
    tensors = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    size = model.config.vocab_size if tokenizer is None else number_of_ids(tokenizer)
    for name in ("sentence_encoder.embed_tokens.weight", "lm_head.bias"):
        tensors[name] = tensors[name][:size]
    return dataclasses.replace(model.config, vocab_size=size), tensors


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn a failed write into a `WriteError`, and nothing else.

    tokenizers writes in Rust and raises a bare `Exception`: "No space left on device (os error
    28)".
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise WriteError(
            f"{target} could not be written: {repr(str(error))[:80]}; nothing was left behind. "
            "Free some space or fix this, or choose another directory"
        ) from error


def _write(staging: Path, tensors: Mapping[str, Tensor]) -> None:
    # Through bytes, because only their owner may read the files of `save_file`. transformers
    # refuses files that do not say "pt". `contiguous`: q, k and v are views into one matrix.
    theirs = {name: each.contiguous() for name, each in to_hugging_face(tensors).items()}
    data = safetensors.torch.save(theirs, metadata={"format": "pt"})
    (staging / "model.safetensors").write_bytes(data)


def _first_id(
    tokenizer: PreTrainedTokenizerBase | None, purposes: tuple[str, ...], default: int
) -> int:
    """Return the id of the first of these special tokens that the tokenizer has."""
    if tokenizer is None:
        return default
    vocabulary = tokenizer.get_vocab()
    tokens = [str(tokenizer.special_tokens_map.get(purpose)) for purpose in purposes]
    return next((vocabulary[token] for token in tokens if token in vocabulary), default)


def _untruncated(tokenizer: PreTrainedTokenizerBase, max_positions: int) -> PreTrainedTokenizerBase:
    """Return a copy that truncates and pads only on request.

    `tokenizer.json` of all-mpnet-base-v2 does both, at 128 tokens.
    """
    plain = copy.deepcopy(tokenizer)
    plain.model_max_length = max_positions
    # The settings are kept twice: in the Rust object (tokenizer.json), and among the arguments
    # (tokenizer_config.json), from where they would come back.
    if isinstance(plain, PreTrainedTokenizerFast):
        plain.backend_tokenizer.no_truncation()
        plain.backend_tokenizer.no_padding()
    for setting in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        plain.init_kwargs.pop(setting, None)
    return plain


def _write_pytorch_bin(staging: Path, tensors: Mapping[str, Tensor]) -> None:
    # Old readers want the decoder's weight and bias by name; torch.save stores shared memory once.
    # `clone`: q, k and v as views would each bring their whole matrix into the file.
    theirs = {name: each.clone() for name, each in to_hugging_face(tensors).items()}
    theirs["lm_head.decoder.weight"] = theirs["mpnet.embeddings.word_embeddings.weight"]
    theirs["lm_head.decoder.bias"] = theirs["lm_head.bias"]
    buffer = io.BytesIO()
    torch.save(theirs, buffer)
    (staging / "pytorch_model.bin").write_bytes(buffer.getbuffer())
