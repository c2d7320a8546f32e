"""One network, two descriptions: our `ModelConfig` and the `config.json` of Hugging Face's.

Eight numbers mean the same in both and differ in name alone (`FIELDS`, read in both directions,
like the table of `names.py`). The ninth differs by two:

>>> described = to_mpnet_config(ModelConfig(), bos_token_id=0, eos_token_id=2)
>>> ModelConfig().max_positions, described.max_position_embeddings
(512, 514)

`max_positions` counts the positions, `max_position_embeddings` the rows of their table, which
begins with two rows that belong to no position (`mpnet/positions.py`). Taken for a length, 514
leads two tokens past the end of the table.

Two defaults of the class lie in wait for whoever leaves a number out. Its eps is not the one that
the released weights were trained with, and its 512 is a number of rows: 510 positions.

>>> MPNetConfig().layer_norm_eps, MPNetConfig().max_position_embeddings
(1e-12, 512)

An eps is no detail. The first LayerNorm meets the sum of two embeddings, which in a fresh network
are drawn from N(0, 0.02): a variance of 0.0008, beside which 1e-5 is 1.2 %, and what it gives out
is 0.6 % smaller:

>>> variance = 2 * 0.02**2
>>> [round((variance / (variance + eps)) ** 0.5, 3) for eps in (1e-12, 1e-5)]
[1.0, 0.994]

So everything is written out; and what others left out is read as what the class would make of it,
for that is the network that they ran.

**What cannot be said.** Some fields of the configuration have no effect, or half of one, since the
code behind them has the value built in (transformers, `modeling_mpnet.py`):

    32 buckets      `compute_position_bias(..., num_buckets=32)`: the field sets the size of the
                    table, and the default of this argument which of its rows are used
    distance 128    the default of another argument, and no field at all
    padding id 1    `self.padding_idx = 1`: positions are counted past the ids that equal it
    gelu            `hidden_act` for the layers; `MPNetLMHead` calls `gelu` by name
    post-norm       the order of the lines: LayerNorm(x + attention(x)), where pre-norm has
                    x + attention(LayerNorm(x))

What a field without effect does, in numbers: a network of 64 buckets keeps its bias for the key 20
tokens to the left or to the right of the query in rows 17 and 49 of its table; the code asks for
rows 10 and 26, where it keeps the bias for keys 10 and about 60 to the left. What was learned
for the right side is never looked at.

>>> import torch
>>> from annotated_mpnet.mpnet.positions import relative_position_bucket
>>> places = torch.tensor([-20, 20])
>>> relative_position_bucket(places, num_buckets=64, max_distance=128).tolist()
[17, 49]
>>> relative_position_bucket(places, num_buckets=32, max_distance=128).tolist()
[10, 26]

A network that differs in one of the five is refused, in both directions: on the way out because
Hugging Face could not run it (`reasons_not_representable`), on the way in because nobody can know
which of two networks is meant, the one that is described or the one that the code runs
(`read_mpnet_config`).

Next: `export.py`.
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
"""What Hugging Face's `modeling_mpnet.py` has in its code instead of its configuration."""

WAY_OUT = "give the directory or Hub name of an MPNet, for example microsoft/mpnet-base"


def reasons_not_representable(config: ModelConfig) -> list[str]:
    """Say why Hugging Face's MPNet cannot be this network; an empty list if it can.

    All reasons at once: who must train anew wants to hear of the second before doing so.

    >>> reasons_not_representable(ModelConfig())
    []
    >>> reasons_not_representable(ModelConfig(normalize_before=True, activation_fn="relu"))
    ['it is pre-norm (--normalize-before)', 'its activation is relu, not gelu']
    """
    buckets = config.relative_attention_num_buckets
    distance = config.relative_attention_max_distance
    reasons = []
    # Without a bias one could export a table of zeros, but it would start to train: another model.
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
    # fairseq's head uses the activation of the layers; so does ours.
    if config.activation_fn != "gelu":
        reasons.append(f"its activation is {config.activation_fn}, not gelu")
    if config.pad_token_id != PAD_TOKEN_ID:
        reasons.append(f"its padding id is {config.pad_token_id}, not {PAD_TOKEN_ID}")
    return reasons


def to_mpnet_config(config: ModelConfig, bos_token_id: int, eos_token_id: int) -> MPNetConfig:
    """Describe a network that Hugging Face's MPNet can be; every number is spelled out.

    Args:
        config: one for which `reasons_not_representable` gives none; it is not asked again here.
        bos_token_id: the tokenizer's id of `<s>`.
        eos_token_id: the tokenizer's id of `</s>`.
    """
    return MPNetConfig(
        **{theirs: vars(config)[ours] for ours, theirs in FIELDS.items()},
        # What `AutoModelForMaskedLM` goes by, and what it loads the weights as.
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
        path: where it was read, for the messages.
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
        # By way of MPNetConfig, since files leave out what equals its defaults: eps 1e-12, say.
        described = MPNetConfig.from_dict(values)
        _refuse_unheeded(path, described)
        # Buckets, distance and padding id are Hugging Face's code's, whatever stands in the file.
        # No dropout inside the feed-forward layer: the network that they ran has none there.
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
            f"{path} describes no MPNet: {type(error).__name__} {repr(str(error))[:80]}; {WAY_OUT}"
        ) from error


def _refuse_unheeded(path: Path, described: MPNetConfig) -> None:
    """Refuse settings that Hugging Face's code does not follow, or our network could not.

    Raises:
        CheckpointError: names all of them, each with the value seen.
    """
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
