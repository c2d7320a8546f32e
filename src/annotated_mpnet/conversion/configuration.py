"""One network, two descriptions: our `ModelConfig` and Hugging Face's `config.json`.

Eight numbers differ in name only (`FIELDS`). The ninth differs by two: `max_positions` counts
positions, `max_position_embeddings` the rows of their table, whose first two rows belong to no
position (`mpnet/positions.py`).

>>> described = to_mpnet_config(ModelConfig(), bos_token_id=0, eos_token_id=2)
>>> ModelConfig().max_positions, described.max_position_embeddings
(512, 514)

Everything is spelled out, because two defaults of the class are wrong for the released weights: an
eps of 1e-12, and 512 rows, so 510 positions. What a file leaves out is read as the class reads it:
that is the network that its authors ran.

**What cannot be expressed.** Five properties are hard-coded in transformers' `modeling_mpnet.py`,
whatever the configuration says:

    32 buckets      the default of an argument; the field only sets the size of the table
    distance 128    the default of another argument; there is no field
    padding id 1    positions are counted past the ids that equal it
    gelu            `MPNetLMHead` calls it by name; `hidden_act` is for the layers
    post-norm       the order of the lines

With 64 buckets, for example, the bias for a key 20 tokens away is in rows 17 (left) and 49 (right)
of the table, and the code looks at rows 10 and 26:

>>> import torch
>>> from annotated_mpnet.mpnet.positions import relative_position_bucket
>>> places = torch.tensor([-20, 20])
>>> relative_position_bucket(places, num_buckets=64, max_distance=128).tolist()
[17, 49]
>>> relative_position_bucket(places, num_buckets=32, max_distance=128).tolist()
[10, 26]

A network that differs in one of the five is refused in both directions.
"""

from pathlib import Path

from transformers import MPNetConfig

from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ModelConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
}
"""Our name -> theirs, where the value is the same."""

BUCKETS, MAX_DISTANCE, PAD_TOKEN_ID = 32, 128, 1
"""Hard-coded in Hugging Face's `modeling_mpnet.py`."""

WAY_OUT = "give the directory or Hub name of an MPNet, for example microsoft/mpnet-base"


def reasons_not_representable(config: ModelConfig) -> list[str]:
    """Say why Hugging Face's MPNet cannot be this network: all reasons; empty if it can.

    >>> reasons_not_representable(ModelConfig())
    []
    >>> reasons_not_representable(ModelConfig(normalize_before=True, activation_fn="relu"))
    ['it is pre-norm (--normalize-before)', 'its activation is relu, not gelu']
    """
    buckets = config.relative_attention_num_buckets
    distance = config.relative_attention_max_distance
    reasons = []
    # A table of zeros could be exported, but it would start to train: another model.
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


def to_mpnet_config(config: ModelConfig, bos_token_id: int, eos_token_id: int) -> MPNetConfig:
    """Describe a network for which `reasons_not_representable` gives none."""
    return MPNetConfig(
        **{theirs: vars(config)[ours] for ours, theirs in FIELDS.items()},
        architectures=["MPNetForMaskedLM"],
        dtype="float32",
        hidden_act=config.activation_fn,
        max_position_embeddings=config.max_positions + config.pad_token_id + 1,
        relative_attention_num_buckets=config.relative_attention_num_buckets,
        pad_token_id=config.pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def read_mpnet_config(path: Path, values: object) -> ModelConfig:
    """Build our configuration from the parsed `config.json` of an MPNet.

    Args:
        path: for the messages.
        values: what JSON gave, of whatever type.

    Raises:
        CheckpointError: another architecture, impossible numbers, or numbers that Hugging Face's
            own code would not follow.
    """
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(values, dict) or kind != "mpnet":
        raise CheckpointError(
            f"{path} has model_type {repr(kind)[:80]}, expected 'mpnet': another architecture's "
            f"weights would leave an MPNet random; {WAY_OUT}"
        )
    try:
        described = MPNetConfig.from_dict(values)
        _refuse_ignored_values(path, described)
        # activation_dropout is 0: their network has no dropout inside the feed-forward layer.
        return ModelConfig(
            **{ours: described.to_dict()[theirs] for ours, theirs in FIELDS.items()},
            max_positions=described.max_position_embeddings - (PAD_TOKEN_ID + 1),
            pad_token_id=PAD_TOKEN_ID,
            activation_dropout=0.0,
            relative_attention_num_buckets=BUCKETS,
            relative_attention_max_distance=MAX_DISTANCE,
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers checks each field in a way of its own
        raise CheckpointError(
            f"{path} does not describe an MPNet: {type(error).__name__} {repr(str(error))[:80]}; "
            f"{WAY_OUT}"
        ) from error


def _refuse_ignored_values(path: Path, described: MPNetConfig) -> None:
    """Refuse values that Hugging Face's code ignores: nobody can know which network is meant."""
    reasons = []
    if described.relative_attention_num_buckets != BUCKETS:
        reasons.append(
            f"relative_attention_num_buckets is {described.relative_attention_num_buckets}, but "
            f"Hugging Face's code computes with {BUCKETS}"
        )
    # gelu_python is another spelling of the same function; gelu_new, the tanh one, is not.
    if described.hidden_act not in ("gelu", "gelu_python"):
        reasons.append(
            f"hidden_act is {repr(described.hidden_act)[:80]}, but the head of Hugging Face's code "
            "has gelu all the same"
        )
    if described.pad_token_id not in (PAD_TOKEN_ID, None):
        reasons.append(
            f"pad_token_id is {described.pad_token_id}, but Hugging Face's code has {PAD_TOKEN_ID}"
        )
    if not described.tie_word_embeddings:
        reasons.append("tie_word_embeddings is false, but MPNet's head shares the embeddings")
    if reasons:
        raise CheckpointError(
            f"{path} contradicts Hugging Face's own MPNet: {'; '.join(reasons)}. annotated-mpnet "
            "exports such models; start from its .pt file instead"
        )
