"""Two languages, one table: fairseq's names, which are ours, and Hugging Face's.

A trained network is a dictionary of named tensors and nothing else. So that another program can run
it, it must find the same numbers under the names that its own modules have. MPNet-base by the book:

>>> ours = expected_tensors(ModelConfig())
>>> theirs = to_hugging_face(ours)
>>> len(ours), len(theirs)
(154, 202)

109.5 million weights, 438 MB in float32, and the same number of them on either side:

>>> [sum(each.numel() for each in side.values()) for side in (ours, theirs)]
[109518527, 109518527]

**The table** names modules, with N for the number of a layer; a tensor is a module and its `weight`
or `bias`. Read from left to right, it exports; from right to left, it imports. Two functions, one
for each direction, would agree on the day that they are written; a table cannot disagree with
itself.

>>> to_hugging_face_name("sentence_encoder.layers.11.fc1.weight")
'mpnet.encoder.layer.11.intermediate.dense.weight'
>>> to_our_name("mpnet.encoder.layer.11.intermediate.dense.weight")
'sentence_encoder.layers.11.fc1.weight'

**What is no matter of names**, and the reason for the 48 tensors more: fairseq, and this project,
keep the projections to query, key and value as one matrix of 3D rows, since one large product is
faster than three small ones. Hugging Face has three. Rows 0..D-1 are q, then k, then v:

    self_attn.in_proj_weight  (3D, D)   <->   attention.attn.q.weight, .k.weight, .v.weight  (D, D)
    self_attn.in_proj_bias    (3D,)     <->   attention.attn.q.bias,   .k.bias,   .v.bias    (D,)

>>> stacked = {"sentence_encoder.layers.0.self_attn.in_proj_bias": torch.arange(6)}  # D = 2
>>> for name, part in to_hugging_face(stacked).items():
...     print(name, part.tolist())
mpnet.encoder.layer.0.attention.attn.q.bias [0, 1]
mpnet.encoder.layer.0.attention.attn.k.bias [2, 3]
mpnet.encoder.layer.0.attention.attn.v.bias [4, 5]

All three have the same shape, so that nobody would notice k in the place of q by loading: only the
logits show it (`proof.py`). Cutting and stacking move numbers and change none; a model that goes
there and back is the same to the bit:

>>> back = to_ours(to_hugging_face(stacked))
>>> all(torch.equal(back[name], each) for name, each in stacked.items())
True

HF: the decoder of the head is tied to the word embeddings, and its bias to `lm_head.bias`; neither
is stored a second time (a copy of the embeddings would be 94 MB).

Next: `configuration.py`, the same for the numbers that describe a network.

    D embed_dim
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

# Where a layer's two norms stand is the trap in this table. Post-norm, each follows the residual
# sum of its sub-layer: fairseq calls the second one `final` (of the layer, not of the network), and
# Hugging Face files each under the module whose output it takes.
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
    """Rename a network of ours, q, k and v taken apart.

    The tensors share memory with the ones given: `chunk` returns views, so that an export needs no
    second network in memory until it makes its bytes.
    """
    renamed = {}
    for name, tensor in tensors.items():
        stacked = STACKED.fullmatch(name)
        if stacked is None:
            renamed[to_hugging_face_name(name)] = tensor
            continue
        # Of both the matrix (3D, D) and the bias (3D,), the first dimension is the one to cut.
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            renamed[_attention_name(stacked[1], letter, stacked[2])] = part
    return renamed


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a network of Hugging Face's, q, k and v stacked; inverse of the former.

    Raises `KeyError` for unknown or missing names: `check_tensors` comes first.
    """
    renamed = {}
    for name, tensor in tensors.items():
        separate = SEPARATE.fullmatch(name)
        if separate is None:
            renamed[to_our_name(name)] = tensor
            continue
        layer, letter, leaf = separate.groups()
        # At q the other two are looked up by name, in whatever order the file has them; when their
        # own turn comes, they are in the stack already.
        if letter == "q":
            parts = [tensors[_attention_name(layer, each, leaf)] for each in "qkv"]
            renamed[f"sentence_encoder.layers.{layer}.self_attn.in_proj_{leaf}"] = torch.cat(parts)
    return renamed


def _translate(name: str, table: Mapping[str, str]) -> str:
    # sentence_encoder.layers.11.fc1.weight   cut off the leaf, and remember the layer
    # sentence_encoder.layers.N.fc1           this is what the table knows
    # mpnet.encoder.layer.N.intermediate.dense.weight, and N becomes 11 again
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return f"{table[module]}.{leaf}"
    general = module.replace(f".{layer[1]}.", ".N.", 1)
    return f"{table[general]}.{leaf}".replace(".N.", f".{layer[1]}.", 1)


def _attention_name(layer: str, letter: str, leaf: str) -> str:
    return f"mpnet.encoder.layer.{layer}.attention.attn.{letter}.{leaf}"


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the network's state as names and shapes: tensors of the `meta` device, without data.

    fairseq's names; `to_hugging_face` turns even these into Hugging Face's. The network itself is
    asked, so that no list of shapes can grow old beside it; on the `meta` device this takes neither
    memory nor random numbers.

    >>> tuple(expected_tensors(ModelConfig())["sentence_encoder.embed_positions.weight"].shape)
    (514, 768)
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
    # Both lists in one message: seen together, a renamed tensor shows as what it is.
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
        # One NaN is enough to make every logit of every sentence NaN, from the first update on.
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {name} holds values that are not finite numbers; the run that wrote "
                "it had diverged, or the file is damaged: take an earlier one"
            )
    # Half precision becomes float32 exactly: every such number is a float32 too.
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def listed(names: list[str]) -> str:
    """Name three of them, escaped and cut, and count the rest.

    >>> listed(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    shown = ", ".join(repr(name)[:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
