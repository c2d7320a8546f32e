"""Weights from Hugging Face: the right ones, all of them, or none.

Three kinds of directory hold an MPNet: one of `MPNetForMaskedLM`, one of `MPNetModel`, and one of
sentence-transformers, whose modules.json says where one of the other two is, and what comes after
it (`sentence_modules.py`). The tensors' names tell what a file holds, not `architectures` in
config.json (all-mpnet-base-v2 calls itself MPNetForMaskedLM and has no head):

    names in the file                          it is                      it becomes
    -----------------------------------------  -------------------------  ----------------------
    mpnet.encoder...        and lm_head...     a whole network            itself
    mpnet.encoder...        and no lm_head     damaged                    an error
    encoder...              and pooler...      an encoder                 itself, and a fresh head
    bert.encoder...                            BERT                       an error

HF: `from_pretrained` on another architecture's directory warns and draws the missing weights at
random; that is why it is not used here.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from annotated_mpnet.conversion.foreign import (
    SAFETENSORS,
    WAY_OUT,
    LoadedWeights,
    checked,
    expect_format,
    expected_tensors,
    read_pickle,
    tokenizer_in,
    without_second_names,
)
from annotated_mpnet.conversion.model_card import FACTS, CardFacts
from annotated_mpnet.conversion.names import read_mpnet_config, to_hugging_face, to_ours
from annotated_mpnet.conversion.sentence_modules import read_modules, transformer_in
from annotated_mpnet.errors import CheckpointError, shown
from annotated_mpnet.files.records import decode, reading

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""`name` or `owner/name`; not `./name`, `/name` or `a/longer/path`."""
SECOND_NAMES = {
    "lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    """Tensor -> file."""


def download(name: str) -> Path:
    """Return the directory of a model of the Hub; raises `CheckpointError`."""
    # Configuration, weights, tokenizer, modules after the network (some are pickles only); no code,
    # no other framework's copy of the weights.
    plain = ["*.json", "*.txt", "*.model", "*.safetensors", "[1-9]_*/pytorch_model.bin"]
    try:
        path = Path(snapshot_download(name, allow_patterns=plain))
        # Most repositories hold both formats; the pickle is read only if it is the only one.
        if not any(transformer_in(path).glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin", "*/pytorch_model*.bin"])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is not a directory, and the Hub does not provide it: {type(error).__name__} "
            f"{shown(' '.join(str(error).split()))}; check name and connection, or give a directory"
        ) from error
    return path


def read_hugging_face(directory: Path) -> LoadedWeights:
    """Read a directory of Hugging Face or of sentence-transformers.

    Raises:
        CheckpointError: not an MPNet, not readable without running code, not complete, or not a
            network that Hugging Face's own code would run as described.
    """
    whole, directory = directory, transformer_in(directory)
    config = read_mpnet_config(directory / "config.json")
    modules, notes = read_modules(whole, config.max_positions)
    path, found = _read_weights(directory)
    # Two things that are not pretrained: the numbers 0, 1, 2, ... that early versions saved, and a
    # pooler, a layer on `<s>` for classifying sentences.
    wanted = {name: each for name, each in found.items() if not name.endswith(".position_ids")}
    found = {name: each for name, each in wanted.items() if ".pooler." not in f".{name}"}
    if len(found) < len(wanted):
        notes.append(f"{path}: the pooler was left out; pretraining has no use for it")

    # File and expectation are compared in the file's language, so an error names what is in the
    # file.
    ours = expected_tensors(config)
    encoder_only = not any(name.startswith(("mpnet.", "lm_head.")) for name in found)
    if encoder_only:
        found = {f"mpnet.{name}": tensor for name, tensor in found.items()}
        ours = {name: each for name, each in ours.items() if not name.startswith("lm_head.")}
        notes.append(f"{path}: an encoder without LM head; the head starts from fresh weights")
    # As TensorFlow called them, and as transformers 5.0 to 5.5 save what they have loaded.
    old_norms = {name: _norm_name(name) for name in found if _norm_name(name) != name}
    found = without_second_names(found, SECOND_NAMES | old_norms, path)
    tensors = to_ours(checked(found, to_hugging_face(ours), path), ours)
    if encoder_only:
        tensors |= _fresh_head(tensors["sentence_encoder.embed_tokens.weight"])
    # In a sentence-transformers directory, the tokenizer is where the network is.
    facts = decode(whole / FACTS, CardFacts) if (whole / FACTS).is_file() else None
    tokenizer = tokenizer_in(directory)
    return LoadedWeights(config, tensors, notes, tokenizer, modules, facts, encoder_only)


def _norm_name(name: str) -> str:
    """Replace the old name of a norm's weight or bias.

    >>> _norm_name("mpnet.embeddings.LayerNorm.gamma")
    'mpnet.embeddings.LayerNorm.weight'
    """
    renamed = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    return renamed.replace("LayerNorm.beta", "LayerNorm.bias")


def _read_weights(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file (or index) that holds the weights, and them under the names that it has."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file():
            return path, _read_tensors(path)
        if index.is_file():
            return index, _read_shards(index)
    raise CheckpointError(
        f"{directory} has neither model.safetensors nor pytorch_model.bin, whole or in shards; "
        f"{WAY_OUT}"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read a model that is spread over several files; the index says which."""
    found: dict[str, Tensor] = {}
    for name in sorted(set(decode(index, _Index).weight_map.values())):
        shard = index.parent / name
        # The name comes from a file: it must not lead out of its directory.
        if Path(name).name != name or not shard.is_file():
            raise CheckpointError(
                f"{index} names the shard {shown(name)}, which is not a file in its directory; "
                "download the model again"
            )
        for tensor_name, tensor in _read_tensors(shard).items():
            if found.setdefault(tensor_name, tensor) is not tensor:
                raise CheckpointError(
                    f"{shard} holds {shown(tensor_name)}, which another shard of {index.name} "
                    "holds too; download the model again"
                )
    return found


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        expect_format(path, SAFETENSORS)
        with reading(path):
            return safetensors.torch.load_file(path, device="cpu")
    weights = read_pickle(path)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds no named tensors; {WAY_OUT}")
    return {str(name): each for name, each in weights.items() if isinstance(each, Tensor)}


def _fresh_head(table_VD: Tensor) -> dict[str, Tensor]:
    """Return a head for a trained encoder that has none: nothing in it is random.

    A random matrix would hide the hidden state from the token embeddings, and a norm of gain 1
    would make the logits as large as the embeddings are long: 2.3 in all-mpnet-base-v2, against
    0.02 sqrt(768) = 0.55 in a new network. The loss would start at 19 bits, above guessing evenly.

    So the hidden state passes unchanged (the identity), and the gain makes the logits as small as a
    new network's. Measured with all-mpnet-base-v2 on the demo's text, the encoder frozen and the
    bias set to the tokens' frequencies (alone they give 9.1 bits), in bits per token:

        matrix     gain   at first   after 40 updates at 5e-5   at 5e-4
        random     1.0     12.8      11.1                       9.1
        random     0.24     9.3       9.1                       8.4
        identity   1.0     12.1       9.8                       8.4
        identity   0.24     8.9       8.6                       8.1      <- this one

    Args:
        table_VD: (V, D), the token embeddings.

    >>> for name, tensor in _fresh_head(torch.ones(9, 4)).items():
    ...     print(name, tuple(tensor.shape), round(tensor.flatten()[0].item(), 3))
    lm_head.bias (9,) 0.0
    lm_head.dense.weight (4, 4) 1.0
    lm_head.dense.bias (4,) 0.0
    lm_head.layer_norm.weight (4,) 0.02
    lm_head.layer_norm.bias (4,) 0.0
    """
    vocab_size, embed_dim = table_VD.shape
    # The norm's output is sqrt(D) long, times the gain; a logit is its product with an embedding.
    length = float(table_VD.norm(dim=1).mean())
    gain = min(1.0, 0.02 * embed_dim**0.5 / length) if length > 0 else 1.0
    return {
        "lm_head.bias": torch.zeros(vocab_size),
        "lm_head.dense.weight": torch.eye(embed_dim),
        "lm_head.dense.bias": torch.zeros(embed_dim),
        "lm_head.layer_norm.weight": torch.full((embed_dim,), gain),
        "lm_head.layer_norm.bias": torch.zeros(embed_dim),
    }
