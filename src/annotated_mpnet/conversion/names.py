"""Two languages, one table: fairseq's names, which are ours, and Hugging Face's.

The table names modules, with N for the number of a layer; a tensor is a module and its `weight` or
`bias`. It is read from left to right to export and from right to left to import, so that the two
directions cannot disagree:

>>> to_hugging_face_name("sentence_encoder.layers.11.fc1.weight")
'mpnet.encoder.layer.11.intermediate.dense.weight'
>>> to_our_name("mpnet.encoder.layer.11.intermediate.dense.weight")
'sentence_encoder.layers.11.fc1.weight'

One thing is no matter of names. fairseq, and this project, keep the projections to query, key and
value as one matrix of 3D rows, since one large product is faster than three small ones; Hugging
Face has three. Rows 0..D-1 are q, then k, then v:

    self_attn.in_proj_weight  (3D, D)   <->   attention.attn.q.weight, .k.weight, .v.weight  (D, D)
    self_attn.in_proj_bias    (3D,)     <->   attention.attn.q.bias,   .k.bias,   .v.bias    (D,)

Cutting and stacking move numbers and change none, so that a model that goes there and back is the
same to the bit.

HF: the decoder of the head is tied to the word embeddings, and its bias to `lm_head.bias`; neither
is stored a second time.

Next: `export.py`.

    D embed_dim
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from annotated_mpnet.config import ModelConfig
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.modeling import MPNetForPretraining

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
    "lm_head": "lm_head",
}
INVERSE_NAMES = {theirs: ours for ours, theirs in NAMES.items()}

STACKED = re.compile(r"sentence_encoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)")
QUERY = re.compile(r"mpnet\.encoder\.layer\.(\d+)\.attention\.attn\.q\.(weight|bias)")
KEY_OR_VALUE = re.compile(r"mpnet\.encoder\.layer\.\d+\.attention\.attn\.[kv]\.(weight|bias)")

BUCKETS, MAX_DISTANCE, PAD_TOKEN_ID = 32, 128, 1
"""What Hugging Face's `modeling_mpnet.py` has in its code instead of its configuration."""


def to_hugging_face_name(name: str) -> str:
    """Translate the name of a tensor (not a stacked one); `KeyError` for an unknown module."""
    return _translate(name, NAMES)


def to_our_name(name: str) -> str:
    """Translate back; `KeyError` for an unknown module."""
    return _translate(name, INVERSE_NAMES)


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole network of ours, q, k and v taken apart."""
    renamed = {}
    for name, tensor in tensors.items():
        stacked = STACKED.fullmatch(name)
        if stacked is None:
            renamed[to_hugging_face_name(name)] = tensor
        else:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[_attention_name(stacked[1], letter, stacked[2])] = part
    return renamed


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole network of Hugging Face's, q, k and v stacked; inverse of the former."""
    renamed = {}
    for name, tensor in tensors.items():
        query = QUERY.fullmatch(name)
        if query is not None:
            layer, leaf = query[1], query[2]
            parts = [tensors[_attention_name(layer, letter, leaf)] for letter in "qkv"]
            stacked = f"sentence_encoder.layers.{layer}.self_attn.in_proj_{leaf}"
            renamed[stacked] = torch.cat(parts)
        elif KEY_OR_VALUE.fullmatch(name) is None:
            renamed[to_our_name(name)] = tensor
    return renamed


def _translate(name: str, table: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return f"{table[module]}.{leaf}"
    general = module.replace(f".{layer[1]}.", ".N.", 1)
    return f"{table[general]}.{leaf}".replace(".N.", f".{layer[1]}.", 1)


def _attention_name(layer: str, letter: str, leaf: str) -> str:
    return f"mpnet.encoder.layer.{layer}.attention.attn.{letter}.{leaf}"


def reasons_not_representable(config: ModelConfig) -> list[str]:
    """Say why Hugging Face's MPNet cannot be this network; an empty list if it can.

    >>> reasons_not_representable(ModelConfig())
    []
    >>> reasons_not_representable(ModelConfig(normalize_before=True, activation_fn="relu"))
    ['it is pre-norm (--normalize-before)', 'its activation is relu, not gelu']

    HF: `hidden_act` would take most activations, but for the layers alone: `MPNetLMHead` calls GELU
    by name, where fairseq's head uses the activation of the layers.
    """
    buckets = config.relative_attention_num_buckets
    distance = config.relative_attention_max_distance
    reasons = []
    if buckets == 0:
        reasons.append("it has no relative position bias")
    elif buckets != BUCKETS:
        reasons.append(f"it has {buckets} relative position buckets, not {BUCKETS}")
    if buckets != 0 and distance != MAX_DISTANCE:
        reasons.append(f"its relative positions reach to distance {distance}, not {MAX_DISTANCE}")
    if config.normalize_before:
        reasons.append("it is pre-norm (--normalize-before)")
    if config.position_embedding != "learned":
        reasons.append(f"its absolute positions are {config.position_embedding}, not learned")
    if config.activation_fn != "gelu":
        reasons.append(f"its activation is {config.activation_fn}, not gelu")
    if config.pad_token_id != PAD_TOKEN_ID:
        reasons.append(f"its padding id is {config.pad_token_id}, not {PAD_TOKEN_ID}")
    return reasons


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the network's state as names and shapes: tensors of the `meta` device, without data.

    fairseq's names; `to_hugging_face` turns even these into Hugging Face's.
    """
    with torch.device("meta"):
        return MPNetForPretraining(config).state_dict()


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the tensors in float32 if they are exactly what is expected, and finite numbers.

    Nothing may be missing and nothing left over: a network with a few random layers, or without a
    few trained ones, trains on without complaint and is only worse.

    Raises:
        CheckpointError: names what is missing, unexpected, of another shape, or not finite.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        parts = [f"{len(missing)} missing ({listed(missing)})"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({listed(unexpected)})"] if unexpected else []
        raise CheckpointError(
            f"{source} does not hold the network that its configuration describes; of "
            f"{len(expected)} tensors: {', '.join(parts)}; it is damaged or of another kind"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)} by its configuration; one of the two is from "
                "another model"
            )
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
