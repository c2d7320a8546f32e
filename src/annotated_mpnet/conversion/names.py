"""One network, two descriptions: names and numbers, ours (which are fairseq's) and Hugging Face's.

**Tensors** differ in their names, one piece of a name at a time (`NAMES`):

>>> to_hugging_face_names("sentence_encoder.layers.11.fc1.weight")
['mpnet.encoder.layer.11.intermediate.dense.weight']

and in one more way: fairseq and this project keep the projections to query, key and value as one
matrix, because one large product is faster than three. Rows 0..D-1 are q, then k, then v:

    self_attn.in_proj_weight  (3D, D)   <->   attention.attn.q.weight, .k.weight, .v.weight  (D, D)
    self_attn.in_proj_bias    (3D,)     <->   attention.attn.q.bias,   .k.bias,   .v.bias    (D,)

>>> stacked = {"sentence_encoder.layers.0.self_attn.in_proj_bias": torch.arange(6)}  # D = 2
>>> for name, part in to_hugging_face(stacked).items():
...     print(name, part.tolist())
mpnet.encoder.layer.0.attention.attn.q.bias [0, 1]
mpnet.encoder.layer.0.attention.attn.k.bias [2, 3]
mpnet.encoder.layer.0.attention.attn.v.bias [4, 5]

All three have the same shape, so loading cannot tell k from q; only the logits show it.

**Numbers** of `config.json` differ in name only (`FIELDS`), but for one: `max_positions` counts
positions, `max_position_embeddings` the rows of their table, whose first two rows belong to no
position (`mpnet/positions.py`).

>>> described = to_mpnet_config(ModelConfig(), bos_token_id=0, eos_token_id=2)
>>> ModelConfig().max_positions, described.max_position_embeddings
(512, 514)

We write all of them, because two defaults of the class are wrong for the released weights: an eps
of 1e-12, and 512 rows, so 510 positions. What a file leaves out is read as the class reads it: that
is the network that its authors ran.

**What cannot be expressed** is hard-coded in transformers' `modeling_mpnet.py`, whatever the
configuration says (`HARD_CODED`). With 64 buckets, for example, the bias for a key 20 tokens away
is in rows 17 (left) and 49 (right) of the table, and the code looks at rows 10 and 26:

>>> from annotated_mpnet.mpnet.positions import relative_position_bucket
>>> places = torch.tensor([-20, 20])
>>> relative_position_bucket(places, num_buckets=64, max_distance=128).tolist()
[17, 49]
>>> relative_position_bucket(places, num_buckets=32, max_distance=128).tolist()
[10, 26]

Such a network is refused in both directions.

    D embed_dim
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from transformers import MPNetConfig

from annotated_mpnet.conversion.foreign import WAY_OUT
from annotated_mpnet.errors import CheckpointError, shown
from annotated_mpnet.files.records import decode, reading
from annotated_mpnet.mpnet.config import ModelConfig

# The two norms are the trap: post-norm, each follows the residual sum of its sub-layer. fairseq
# calls the second one `final` (of the layer), and Hugging Face files each under the module whose
# output it takes.
NAMES = {
    "sentence_encoder.embed_tokens.": "mpnet.embeddings.word_embeddings.",
    "sentence_encoder.embed_positions.": "mpnet.embeddings.position_embeddings.",
    "sentence_encoder.emb_layer_norm.": "mpnet.embeddings.LayerNorm.",
    "sentence_encoder.relative_attention_bias.": "mpnet.encoder.relative_attention_bias.",
    "sentence_encoder.layers.": "mpnet.encoder.layer.",
    ".self_attn.out_proj.": ".attention.attn.o.",
    ".self_attn_layer_norm.": ".attention.LayerNorm.",
    ".fc1.": ".intermediate.dense.",
    ".fc2.": ".output.dense.",
    ".final_layer_norm.": ".output.LayerNorm.",
}
"""Our piece of a tensor's name -> theirs. The head has the same names in both."""

FIELDS = {
    "vocab_size": "vocab_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "activation_fn": "hidden_act",
    "pad_token_id": "pad_token_id",
    "relative_attention_num_buckets": "relative_attention_num_buckets",
}
"""Our name of a number -> theirs, where the value is the same."""

HARD_CODED = {
    # A default argument; the field only sets the size of the table.
    "relative_attention_num_buckets": 32,
    # Another default argument, without a field.
    "relative_attention_max_distance": 128,
    # Positions are counted past the ids that equal it.
    "pad_token_id": 1,
    # `MPNetLMHead` calls it by name; `hidden_act` is for the layers.
    "activation_fn": "gelu",
    # The order of the lines.
    "normalize_before": False,
    "position_embedding": "learned",
}
"""What Hugging Face's MPNet always has, under our names."""

Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class _Described(msgspec.Struct, rename=FIELDS):
    """`config.json` under our names, with the defaults of transformers' class."""

    vocab_size: Size = 30527
    encoder_layers: Size = 12
    encoder_embed_dim: Size = 768
    encoder_ffn_dim: Size = 3072
    encoder_attention_heads: Size = 12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    activation_fn: str = "gelu"
    pad_token_id: Size | None = 1
    relative_attention_num_buckets: int = 32
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=3, le=2**40)] = 512
    tie_word_embeddings: bool = True


def to_hugging_face_names(name: str) -> list[str]:
    """Return Hugging Face's names of one of our tensors: three for a stacked one."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    stacked = ".self_attn.in_proj_"
    if stacked not in name:
        return [name]
    return [name.replace(stacked, f".attention.attn.{each}.") for each in "qkv"]


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our network, with q, k and v taken apart; no tensor is copied."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = to_hugging_face_names(name)
        renamed |= zip(names, tensor.chunk(len(names)), strict=True)
    return renamed


def to_ours(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return our tensors of these names, made from all of Hugging Face's."""
    return {
        name: torch.cat([tensors[each] for each in to_hugging_face_names(name)]) for name in names
    }


def reasons_not_representable(config: ModelConfig) -> list[str]:
    """Say why Hugging Face's MPNet cannot be this network: all reasons; empty if it can.

    >>> reasons_not_representable(ModelConfig())
    []
    >>> reasons_not_representable(ModelConfig(normalize_before=True, activation_fn="relu"))
    ['activation_fn is relu, not gelu', 'normalize_before is True, not False']
    """
    return [
        f"{name} is {vars(config)[name]}, not {value}"
        for name, value in HARD_CODED.items()
        if vars(config)[name] != value
    ]


def to_mpnet_config(config: ModelConfig, bos_token_id: int, eos_token_id: int) -> MPNetConfig:
    """Describe a network for which `reasons_not_representable` gives none."""
    return MPNetConfig(
        **{theirs: vars(config)[ours] for ours, theirs in FIELDS.items()},
        architectures=["MPNetForMaskedLM"],
        dtype="float32",
        max_position_embeddings=config.max_positions + config.pad_token_id + 1,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def read_mpnet_config(path: Path) -> ModelConfig:
    """Build our configuration from the `config.json` of an MPNet.

    Raises:
        CheckpointError: another architecture, impossible numbers, or numbers that Hugging Face's
            own code would not follow.
    """
    values = decode(path, dict[str, Any])
    if (kind := values.get("model_type")) != "mpnet":
        raise CheckpointError(
            f"{path} has model_type {shown(kind)}, expected 'mpnet': another architecture's "
            f"weights would leave an MPNet random; {WAY_OUT}"
        )
    with reading(path):
        described = msgspec.structs.asdict(msgspec.convert(values, _Described))
        rows, tied = described.pop("max_position_embeddings"), described.pop("tie_word_embeddings")
        # Other spellings: of the same function (gelu_new is another one), and of "as in the code".
        if described["activation_fn"] == "gelu_python":
            described["activation_fn"] = "gelu"
        if described["pad_token_id"] is None:
            described["pad_token_id"] = HARD_CODED["pad_token_id"]
        described["max_positions"] = rows - 2
        try:
            # Their network has no dropout inside the feed-forward layer.
            config = ModelConfig(**described, activation_dropout=0.0)
        except ValueError as error:
            raise ValueError(_in_their_words(str(error))) from error
    reasons = [_in_their_words(reason) for reason in reasons_not_representable(config)]
    if not tied:
        reasons.append("tie_word_embeddings is False, not True")
    # The file does not say which of the two its authors trained.
    if reasons:
        raise CheckpointError(
            f"{path} contradicts Hugging Face's own MPNet, which computes with other values: "
            f"{'; '.join(reasons)}. annotated-mpnet exports such models; start from its .pt file"
        )
    return config


def _in_their_words(message: str) -> str:
    """Replace our names of fields, also as flags.

    >>> _in_their_words("--attention-dropout is 2, not vocab_size")
    'attention_probs_dropout_prob is 2, not vocab_size'
    """
    for ours, theirs in FIELDS.items():
        either = ours.replace("_", "[-_]")
        message = re.sub(rf"(?<![\w-])(--)?{either}\b", theirs, message)
    return message
