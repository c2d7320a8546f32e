"""Weights from Hugging Face: the right ones, all of them, or none.

Three kinds of directory hold an MPNet:

    MPNetForMaskedLM        mpnet.encoder...   lm_head...        the whole network
    MPNetModel              encoder...         pooler...         the encoder, without a head
    sentence-transformers   modules.json, which says where one of the former two is: in the
                            directory itself, or in 0_Transformer

The two kinds of weights are told apart by their names, not by `architectures` in config.json
(all-mpnet-base-v2 calls itself MPNetForMaskedLM, and is none): the class with a head puts `mpnet.`
before each name of its encoder, the class without does not. So an encoder that never had a head is
something else than a network that lost it. The first gets a fresh head, and a note says so; the
second is refused.

An encoder-only model is a good place to start from: 99 % of what was learned is in it. The head of
MPNet-base has 0.6 million weights of its own, and the token embeddings do the rest.

What the configuration says counts only where Hugging Face's code heeds it. It says 64 buckets: the
code uses 32 of them. Such a model is refused, since nobody can know which of two networks is meant.

HF: `from_pretrained` on another architecture's directory warns, and draws the weights that are
missing from a random generator; that is why it is not used here. Files are read as plain tensors,
`pytorch_model.bin` with `weights_only=True`, which runs no code.

Next: `fairseq.py`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import MPNetConfig

from annotated_mpnet.config import ModelConfig
from annotated_mpnet.conversion.names import (
    BUCKETS,
    MAX_DISTANCE,
    PAD_TOKEN_ID,
    check_tensors,
    expected_tensors,
    to_hugging_face,
    to_ours,
)
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.modeling import MPNetForPretraining

WAY_OUT = "give the directory or Hub name of an MPNet, for example microsoft/mpnet-base"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LARGEST_JSON = 1024 * 1024
"""Bytes; a configuration has about one thousand."""


def load_hugging_face(
    directory_or_name: str,
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Read an MPNet of Hugging Face's.

    Args:
        directory_or_name: a directory, or else a name on the Hub; only this touches the network.

    Returns:
        The network's configuration; its tensors in float32 under our names, complete; and what the
        user should know. `mask_token_id` is the tokenizer's to tell, and has its default here;
        `activation_dropout` is 0, since Hugging Face's network has none.

    Raises:
        CheckpointError: not there, not an MPNet, not readable without running code, not complete,
            or not a network that Hugging Face's own code would run as described.
    """
    return read_directory(locate(directory_or_name))


def locate(directory_or_name: str) -> Path:
    """Return the directory that holds config.json and weights, downloaded if need be."""
    path = Path(directory_or_name)
    if not path.is_dir():
        path = _download(directory_or_name)
    return _transformer_of(path)


def read_directory(directory: Path) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Read a directory that `locate` returned; see `load_hugging_face`."""
    config = _read_config(directory)
    path, found = _read_weights(directory)
    notes = []
    # Early versions saved the numbers 0, 1, 2, ... with the weights.
    found = {name: each for name, each in found.items() if not name.endswith(".position_ids")}
    pooler = [name for name in found if ".pooler." in f".{name}"]
    if pooler:
        found = {name: each for name, each in found.items() if name not in pooler}
        notes.append(f"{path}: the pooler was left aside; pretraining has no use for it")

    expected = to_hugging_face(expected_tensors(config))
    encoder_only = not any(name.startswith(("mpnet.", "lm_head.")) for name in found)
    if encoder_only:
        found = {f"mpnet.{name}": tensor for name, tensor in found.items()}
        expected = {name: each for name, each in expected.items() if name.startswith("mpnet.")}
        notes.append(f"{path}: an encoder without LM head; the head starts from fresh weights")
    found = check_tensors(_untied(found, str(path)), expected, str(path))
    tensors = to_ours(found)
    if encoder_only:
        tensors |= _fresh_head(config)
    return config, tensors, notes


def read_safely(path: Path) -> object:
    """Read a file of `torch.save`, as far as it holds plain data; no code in it is run.

    Raises:
        CheckpointError: it holds something else, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make a pickle machine raise anything
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise CheckpointError(
                f"{path} cannot be read: {type(error).__name__} {repr(str(error))[:80]}; it is "
                "damaged, or no file of PyTorch's"
            ) from error
        raise CheckpointError(
            f"{path} holds {repr(foreign[1])[:80]}, which only a program could rebuild; nothing in "
            "it was run. If you trust it, save its plain tensors anew where it was made: "
            "torch.save({'args': vars(args), 'model': model.state_dict()}, 'plain.pt')"
        ) from error


def _download(name: str) -> Path:
    if HUB_NAME.fullmatch(name) is None:
        raise CheckpointError(f"{name!r} is no directory, and no name on the Hub; {WAY_OUT}")
    plain = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        path = Path(snapshot_download(name, allow_patterns=plain))
        # The larger and less safe format only where there is no other.
        if not any(path.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model.bin", "*/pytorch_model.bin"])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is no directory here, and the Hub does not give it: {type(error).__name__} "
            f"{repr(str(error))[:80]}; check name and connection, or give a directory"
        ) from error
    return path


def _transformer_of(directory: Path) -> Path:
    """Return where in a sentence-transformers directory the network is; others are returned."""
    if not (directory / "modules.json").is_file():
        old_layout = directory / "0_Transformer"
        return old_layout if (old_layout / "config.json").is_file() else directory
    modules = _read_json(directory / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        if isinstance(module, dict) and str(module.get("type")).endswith("Transformer"):
            inner = directory / str(module.get("path", ""))
            if inner.resolve().is_relative_to(directory.resolve()):
                return inner
    raise CheckpointError(
        f"{directory / 'modules.json'} names no Transformer module inside of the directory; "
        f"{WAY_OUT}"
    )


def _read_json(path: Path) -> object:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__} {repr(str(error))[:80]}; {WAY_OUT}"
        ) from error


def _read_config(directory: Path) -> ModelConfig:
    path = directory / "config.json"
    values = _read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(values, dict) or kind != "mpnet":
        raise CheckpointError(
            f"{path} has model_type {repr(kind)[:80]}, expected 'mpnet': another architecture's "
            f"weights would leave an MPNet random; {WAY_OUT}"
        )
    try:
        # By way of MPNetConfig, since files leave out what equals its defaults: eps 1e-12, say.
        theirs = MPNetConfig.from_dict(values)
        _refuse_unheeded(path, theirs)
        return ModelConfig(
            vocab_size=theirs.vocab_size,
            max_positions=theirs.max_position_embeddings - (PAD_TOKEN_ID + 1),
            pad_token_id=PAD_TOKEN_ID,
            encoder_layers=theirs.num_hidden_layers,
            encoder_embed_dim=theirs.hidden_size,
            encoder_ffn_dim=theirs.intermediate_size,
            encoder_attention_heads=theirs.num_attention_heads,
            dropout=theirs.hidden_dropout_prob,
            attention_dropout=theirs.attention_probs_dropout_prob,
            activation_dropout=0.0,
            relative_attention_num_buckets=BUCKETS,
            relative_attention_max_distance=MAX_DISTANCE,
            layer_norm_eps=theirs.layer_norm_eps,
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers checks each field in a way of its own
        raise CheckpointError(
            f"{path} describes no MPNet: {type(error).__name__} {repr(str(error))[:80]}; {WAY_OUT}"
        ) from error


def _refuse_unheeded(path: Path, theirs: MPNetConfig) -> None:
    """Refuse settings that Hugging Face's code does not follow, or our network could not."""
    reasons = []
    if theirs.relative_attention_num_buckets != BUCKETS:
        reasons.append(
            f"relative_attention_num_buckets is {theirs.relative_attention_num_buckets}, but "
            f"Hugging Face's code computes with {BUCKETS}"
        )
    if theirs.hidden_act not in ("gelu", "gelu_python"):
        reasons.append(
            f"hidden_act is {repr(theirs.hidden_act)[:80]}, but the head of Hugging Face's code "
            "has gelu all the same"
        )
    if theirs.pad_token_id not in (PAD_TOKEN_ID, None):
        reasons.append(
            f"pad_token_id is {theirs.pad_token_id}, but Hugging Face's code has {PAD_TOKEN_ID}"
        )
    if not theirs.tie_word_embeddings:
        reasons.append("tie_word_embeddings is false, but MPNet's head shares the embeddings")
    if reasons:
        raise CheckpointError(
            f"{path} contradicts Hugging Face's own MPNet: {'; '.join(reasons)}. annotated-mpnet "
            "exports such models; start from its .pt file instead"
        )


def _read_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    path = directory / "model.safetensors"
    if path.is_file():
        try:
            return path, safetensors.torch.load_file(path, device="cpu")
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {type(error).__name__} {repr(str(error))[:80]}; it is "
                "damaged, or no safetensors file"
            ) from error
    path = directory / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has neither model.safetensors nor pytorch_model.bin; {WAY_OUT}"
        )
    weights = read_safely(path)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds no named tensors; {WAY_OUT}")
    return path, {str(name): each for name, each in weights.items() if isinstance(each, Tensor)}


def _untied(found: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Drop the second names of tied tensors, if they really are the same.

    Which of the two names a file has depends on the version that wrote it; the bias of the decoder
    may even be there under its second name alone.
    """
    kept = dict(found)
    for second, first in (
        ("lm_head.decoder.weight", "mpnet.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ):
        tensor = kept.pop(second, None)
        if tensor is not None and not torch.equal(kept.setdefault(first, tensor), tensor):
            raise CheckpointError(
                f"{source}: {second} differs from {first}; MPNet's head shares them, so this is "
                "another kind of model"
            )
    return kept


def _fresh_head(config: ModelConfig) -> dict[str, Tensor]:
    """Return the head of a new network: always the same one, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = MPNetForPretraining(replace(config, encoder_layers=1, encoder_ffn_dim=1))
    return {
        name: tensor.detach()
        for name, tensor in fresh.state_dict().items()
        if name.startswith("lm_head.")
    }
