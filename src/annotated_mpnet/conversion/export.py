"""Our weights as a Hugging Face model: written, proved (`proof.py`), and only then published.

    model.safetensors       the tensors in float32, under Hugging Face's names
    config.json             what MPNetConfig needs, eps and padding id spelled out
    tokenizer.json, ...     so the directory is enough, offline
    README.md               the model card (`model_card.py`), and annotated_mpnet.json, its facts
    modules.json, ...       of a sentence encoder, what comes after the network
    pytorch_model.bin       on request, for readers without safetensors

**All or nothing.** It is built beside its target and renamed when it is proved (`files/output.py`).

**Left out**: the optimizer's state, and rows of the embeddings that belong to no token, where the
vocabulary was padded for matrix kernels (30,527 tokens in 30,592 rows, say).

**Length.** The tokenizer's `model_max_length` is `max_positions`, 512 tokens with `<s>` and `</s>`;
not the 514 of `max_position_embeddings`.

**sentence-transformers** opens the directory too. What began as a sentence encoder still is one
(`sentence_modules.py`); for any other model it finds no modules.json and puts a mean over the
tokens after the encoder.
"""

import copy
import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from annotated_mpnet.conversion.model_card import FACTS, CardFacts, model_card
from annotated_mpnet.conversion.names import (
    reasons_not_representable,
    to_hugging_face,
    to_mpnet_config,
)
from annotated_mpnet.conversion.proof import compare_logits, quiet_transformers
from annotated_mpnet.conversion.vocabulary import difference_to_weights, tokenizer_difference
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.files.atomic import write_files
from annotated_mpnet.files.output import HUGGING_FACE_MODEL, output_directory, write_errors
from annotated_mpnet.files.records import reading, to_json
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import load_tokenizer, vocabulary_of, write_tokenizer


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
    tokenizer: PreTrainedTokenizerFast | None,
    overwrite: bool = False,
    pytorch_bin: bool = False,
    save_tokenizer: bool = True,
    modules: Mapping[str, bytes] = MappingProxyType({}),
    facts: CardFacts | None = None,
    fresh_head: bool = False,
    on_hub: str | None = None,
) -> ExportReport:
    """Write a model as Hugging Face's `MPNetForMaskedLM`, and prove that it is the same network.

    >>> from tempfile import TemporaryDirectory
    >>> config = ModelConfig(vocab_size=99, encoder_embed_dim=24, encoder_ffn_dim=32)
    >>> model = MPNetForPretraining(dataclasses.replace(config, encoder_layers=1))
    >>> with TemporaryDirectory() as folder:
    ...     target = Path(folder) / "hf"
    ...     report = export_to_hugging_face(model, target, tokenizer=None, overwrite=False)
    >>> [file.name for file in report.files], report.max_difference < 1e-5
    (['README.md', 'config.json', 'model.safetensors'], True)

    Args:
        model: on any device, in any mode; not changed.
        directory: the target; absent or empty, unless `overwrite`.
        tokenizer: the model's. It tells the ids of `<s>` and `</s>`, and how many rows of a padded
            vocabulary are tokens. None: 0, 2 and all.
        overwrite: replace an older Hugging Face model there.
        pytorch_bin: also write `pytorch_model.bin`.
        save_tokenizer: also write the tokenizer, without truncation and padding.
        modules: of a sentence encoder (`LoadedWeights.modules`).
        facts: for the model card: how it was trained.
        fresh_head: for the model card: whether the LM head was made up.
        on_hub: for the model card: its name on the Hub, if it will be uploaded.

    Raises:
        ConfigError: Hugging Face cannot represent the network (all reasons are named), the
            tokenizer is not the model's, or the directory is in use. Nothing was written.
        CheckpointError: the export does not do what the model does. Nothing was left behind.
        WriteError: full disk, lost permission. Nothing was left behind.
    """
    reasons, bos, eos, size = reasons_not_representable(model.config), 0, 2, model.config.vocab_size
    if tokenizer is not None:
        with reading("the tokenizer"):
            vocabulary = vocabulary_of(tokenizer)
        bos, eos, size = vocabulary.cls_id, vocabulary.sep_id, vocabulary.size
        if (problem := difference_to_weights(model.config, vocabulary)) is not None:
            reasons.append(f"{problem}: not its own tokenizer")
    if reasons:
        raise ConfigError(
            f"Hugging Face's MPNet cannot be this model: {'; '.join(reasons)}; nothing was "
            "written. Train with what it can represent, or use the checkpoint as it is"
        )
    config, tensors = _cut_vocabulary(model, size)
    with (
        output_directory(directory, HUGGING_FACE_MODEL, overwrite=overwrite) as staging,
        quiet_transformers(),
    ):
        _write(staging, tensors, pytorch_bin)
        to_mpnet_config(config, bos, eos).save_pretrained(staging)
        write_files(staging, modules)
        card = model_card(
            facts,
            config,
            directory,
            on_hub,
            parameters=sum(each.numel() for each in tensors.values()),
            is_sentence_encoder=bool(modules),
            fresh_head=fresh_head,
        )
        (staging / "README.md").write_text(card, encoding="utf-8")
        if facts is not None and facts.updates:
            (staging / FACTS).write_text(to_json(facts), encoding="utf-8")
        difference = compare_logits(staging, config, tensors)
        if tokenizer is not None and save_tokenizer:
            plain = _untruncated(tokenizer, config.max_positions)
            with reading("the tokenizer"):
                with write_errors(directory):
                    write_tokenizer(plain, staging)
                opened = load_tokenizer(str(staging))
                # Twice: neither has a token that the other lacks.
                problem = tokenizer_difference(plain, opened, special=True)
                problem = problem or tokenizer_difference(opened, plain, special=True)
            if problem is not None:
                raise CheckpointError(
                    f"the tokenizer changes when it is saved and opened again: {problem}; nothing "
                    "was left behind. Export without it (--no-save-tokenizer)"
                )
    return ExportReport(
        directory=directory,
        files=tuple(sorted(directory.iterdir())),
        max_difference=difference,
        vocabulary_cut=model.config.vocab_size - size,
    )


def _cut_vocabulary(model: MPNetForPretraining, size: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the network on the CPU, in float32, with a row for each token and no more.

    fill-mask picks ids from all logits, and could pick a row without a token.
    """
    tensors = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    for name in ("sentence_encoder.embed_tokens.weight", "lm_head.bias"):
        tensors[name] = tensors[name][:size]
    return dataclasses.replace(model.config, vocab_size=size), tensors


def _write(staging: Path, tensors: Mapping[str, Tensor], pytorch_bin: bool) -> None:
    # `clone`: q, k and v are views, and would each bring their whole matrix into a pickle.
    theirs = {
        name: each.clone(memory_format=torch.contiguous_format)
        for name, each in to_hugging_face(tensors).items()
    }
    # Through bytes, because only their owner may read the files of `save_file`. transformers
    # refuses files that do not say "pt".
    data = safetensors.torch.save(theirs, metadata={"format": "pt"})
    (staging / "model.safetensors").write_bytes(data)
    if pytorch_bin:
        # Old readers want the decoder's weight and bias by name; torch.save stores shared memory
        # once.
        theirs["lm_head.decoder.weight"] = theirs["mpnet.embeddings.word_embeddings.weight"]
        theirs["lm_head.decoder.bias"] = theirs["lm_head.bias"]
        buffer = io.BytesIO()
        torch.save(theirs, buffer)
        (staging / "pytorch_model.bin").write_bytes(buffer.getbuffer())


def _untruncated(tokenizer: PreTrainedTokenizerFast, max_positions: int) -> PreTrainedTokenizerFast:
    """Return a copy that truncates and pads only on request.

    `tokenizer.json` of all-mpnet-base-v2 does both, at 128 tokens.
    """
    plain = copy.deepcopy(tokenizer)
    plain.model_max_length = max_positions
    # The settings are kept twice: in the Rust object (tokenizer.json), and among the arguments
    # (tokenizer_config.json), from where they would come back.
    plain.backend_tokenizer.no_truncation()
    plain.backend_tokenizer.no_padding()
    for setting in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        plain.init_kwargs.pop(setting, None)
    return plain
