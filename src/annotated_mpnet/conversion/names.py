"""One table of tensor names, read in both directions: fairseq's, which are ours, and Hugging
Face's.

>>> to_hugging_face_name("sentence_encoder.layers.11.fc1.weight")
'mpnet.encoder.layer.11.intermediate.dense.weight'
>>> to_our_name("mpnet.encoder.layer.11.intermediate.dense.weight")
'sentence_encoder.layers.11.fc1.weight'

The one difference that is not a name: fairseq and this project keep the projections to query, key
and value as one matrix, because one large product is faster than three. Rows 0..D-1 are q, then k,
then v:

    self_attn.in_proj_weight  (3D, D)   <->   attention.attn.q.weight, .k.weight, .v.weight  (D, D)
    self_attn.in_proj_bias    (3D,)     <->   attention.attn.q.bias,   .k.bias,   .v.bias    (D,)

>>> stacked = {"sentence_encoder.layers.0.self_attn.in_proj_bias": torch.arange(6)}  # D = 2
>>> for name, part in to_hugging_face(stacked).items():
...     print(name, part.tolist())
mpnet.encoder.layer.0.attention.attn.q.bias [0, 1]
mpnet.encoder.layer.0.attention.attn.k.bias [2, 3]
mpnet.encoder.layer.0.attention.attn.v.bias [4, 5]

All three have the same shape, so loading cannot tell k from q; only the logits show it.

    D embed_dim
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

# N is the number of a layer. The two norms are the trap: post-norm, each follows the residual sum
# of its sub-layer. fairseq calls the second one `final` (of the layer), and Hugging Face files each
# under the module whose output it takes.
NAMES = {
    "sentence_encoder.embed_tokens": "mpnet.embeddings.word_embeddings",
    "sentence_encoder.embed_positions": "mpnet.embeddings.position_embeddings",
    "sentence_encoder.emb_layer_norm": "mpnet.embeddings.LayerNorm",
    "sentence_encoder.relative_attention_bias": "mpnet.encoder.relative_attention_bias",
    "sentence_encoder.layers.N.self_attn.out_proj": "mpnet.encoder.layer.N.attention.attn.o",
    "sentence_encoder.layers.N.self_attn_layer_norm": "mpnet.encoder.layer.N.attention.LayerNorm",
    "sentence_encoder.layers.N.fc1": "mpnet.encoder.layer.N.intermediate.dense",
    "sentence_encoder.layers.N.fc2": "mpnet.encoder.layer.N.output.dense",
    "sentence_encoder.layers.N.final_layer_norm": "mpnet.encoder.layer.N.output.LayerNorm",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
    "lm_head": "lm_head",  # its bias, of V numbers
}
INVERSE_NAMES = {theirs: ours for ours, theirs in NAMES.items()}

STACKED = re.compile(r"sentence_encoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)")
SEPARATE = re.compile(r"mpnet\.encoder\.layer\.(\d+)\.attention\.attn\.([qkv])\.(weight|bias)")


def to_hugging_face_name(name: str) -> str:
    """Translate the name of a tensor (not a stacked one); `KeyError` for an unknown module."""
    return _translate(name, NAMES)


def to_our_name(name: str) -> str:
    """Translate back; `KeyError` for an unknown module."""
    return _translate(name, INVERSE_NAMES)


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our network, with q, k and v taken apart; no tensor is copied."""
    renamed = {}
    for name, tensor in tensors.items():
        if stacked := STACKED.fullmatch(name):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[_attention_name(stacked[1], letter, stacked[2])] = part
        else:
            renamed[to_hugging_face_name(name)] = tensor
    return renamed


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a network of Hugging Face, with q, k and v stacked.

    Raises `KeyError` for unknown or missing names: call `check_tensors` first.
    """
    renamed = {}
    for name, tensor in tensors.items():
        separate = SEPARATE.fullmatch(name)
        if separate is None:
            renamed[to_our_name(name)] = tensor
        elif separate[2] == "q":
            layer, _, leaf = separate.groups()
            parts = [tensors[_attention_name(layer, each, leaf)] for each in "qkv"]
            renamed[f"sentence_encoder.layers.{layer}.self_attn.in_proj_{leaf}"] = torch.cat(parts)
    return renamed


def _translate(name: str, table: Mapping[str, str]) -> str:
    # sentence_encoder.layers.11.fc1.weight: without its leaf, and N for 11, it is in the table.
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return f"{table[module]}.{leaf}"
    general = module.replace(f".{layer[1]}.", ".N.", 1)
    return f"{table[general]}.{leaf}".replace(".N.", f".{layer[1]}.", 1)


def _attention_name(layer: str, letter: str, leaf: str) -> str:
    return f"mpnet.encoder.layer.{layer}.attention.attn.{letter}.{leaf}"


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the network's state under our names, on the `meta` device: shapes without data.

    >>> tuple(expected_tensors(ModelConfig())["sentence_encoder.embed_positions.weight"].shape)
    (514, 768)
    """
    with torch.device("meta"):
        return MPNetForPretraining(config).state_dict()


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the tensors in float32 if they are exactly what is expected, and finite.

    A network with a few random layers trains on without complaint and is only worse.

    Raises:
        CheckpointError: names what is missing, unexpected, of another shape, or not finite.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    # Both lists in one message: side by side, a renamed tensor shows as what it is.
    if missing or unexpected:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({listed(unexpected)})"] if unexpected else []
        raise CheckpointError(
            f"{source} does not hold the network that its configuration describes; of "
            f"{len(expected)} tensors: {', '.join(parts)}; it is damaged or another kind of model"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)} by its configuration; one of the two is from "
                "another model"
            )
        # One NaN makes every logit of every sentence NaN from the first update.
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {name} holds values that are not finite numbers; the run that wrote "
                "it had diverged, or the file is damaged: take an earlier one"
            )
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def listed(names: list[str]) -> str:
    """Name three of them, escaped and cut, and count the rest.

    >>> listed(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    shown = ", ".join(repr(name)[:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
