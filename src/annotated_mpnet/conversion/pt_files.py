"""Weights from `.pt` files: Microsoft's own, and those of annotated-mpnet.

Both are a dictionary, pickled by `torch.save`:

    fairseq           model         tensors, named decoder.sentence_encoder..., decoder.lm_head...
                      args          an argparse.Namespace (upstream, later: cfg, a dictionary)
                      extra_state   among other things a few stopwatches, as Python objects
    annotated-mpnet   model_states  tensors, named sentence_encoder..., lm_head...; with
                                    _orig_mod. before it if the model was compiled
                      args          a Namespace, later a dictionary

Loading a pickle runs it. `weights_only` runs a harmless subset in which only listed classes may
occur. The list here is as short as the files allow: Namespace, which only holds values, and a
stand-in for fairseq's three stopwatches. A file with anything else is refused.

**The architecture** is read from the tensors wherever they show it, because a tensor cannot be
wrong about its own shape. For MPNet-base:

    embed_tokens.weight              30527 x 768     vocabulary, width
    embed_positions.weight             514 x 768     512 positions, given the padding id
    layers.0.fc1.weight               3072 x 768     width of the feed-forward layer
    relative_attention_bias.weight      32 x 12      buckets, heads
    layers.11...., and no layers.12                  12 layers

Only what no shape shows comes from `args`: activation, pre-norm, dropout, the largest distance, the
padding id, and the heads where there is no bias table. (A wrong number of heads loads without a
complaint and computes nonsense.) `layer_norm_eps` is 1e-5 in the code of both programs.

**annotated-mpnet** has two pitfalls. Unless told otherwise it stretches the largest distance with
the sequence, and only its code says how:

>>> [stretched_distance(positions) for positions in (512, 515, 516, 1024, 2048)]
[128, 128, 136, 256, 512]

And its later versions changed pre-norm: the embeddings are normalised *and* there is a separate
final norm. That network is neither fairseq's nor ours; a tensor gives it away, and it is refused.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from annotated_mpnet.conversion.hugging_face import read_safely
from annotated_mpnet.conversion.names import check_tensors, expected_tensors
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.mpnet.config import ActivationName, ModelConfig

ENCODER = "sentence_encoder"
PREFIX = re.compile(r"(_orig_mod\.|module\.|decoder\.)*")
"""What `torch.compile`, `DistributedDataParallel` and fairseq put before each name. In fairseq,
MPNet is a language model, and the network of a language model is called its decoder."""
METERS = ("AverageMeter", "StopwatchMeter", "TimeMeter")

Arguments = Mapping[str, object]


class _Meter:
    """Replaces fairseq's stopwatches, which are read and thrown away."""


def load_fairseq_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Read a `.pt` file of fairseq or annotated-mpnet.

    Returns:
        The network's configuration; its tensors in float32 under our names, complete; and notes
        for the user. `mask_token_id` is the tokenizer's to tell, and has its default here.

    Raises:
        CheckpointError: the file holds more than plain data (nothing of it is run), is damaged, or
            is not the whole of a network that we can represent.
    """
    return read_pt_file(path)[:3]


def read_pt_file(path: Path) -> tuple[ModelConfig, dict[str, Tensor], list[str], Arguments]:
    """Read a `.pt` file; also return the arguments of the run that wrote it."""
    # Allowed for this file only: PyTorch has one list for the whole process.
    stand_ins = [(_Meter, f"fairseq.meters.{name}") for name in METERS]
    with torch.serialization.safe_globals([Namespace, *stand_ins]):
        document = read_safely(path)
    document = document if isinstance(document, Mapping) else {}
    weights = document.get("model", document.get("model_states"))
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"{path} is not a training checkpoint: expected a dictionary with 'model' (fairseq) or "
            "'model_states' (annotated-mpnet); for a pytorch_model.bin, give its directory"
        )
    found = {
        PREFIX.sub("", str(name), count=1): each
        for name, each in weights.items()
        if isinstance(each, Tensor)
    }
    _untie(found, path)
    arguments = _arguments(document)
    notes = []
    if not arguments:
        notes.append(f"{path}: no arguments in the file; assumed gelu, post-norm, distance 128")
    try:
        config = _config(found, arguments, path)
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} does not describe an MPNet: {repr(str(error))[:200]}"
        ) from error
    # The configuration was read from layer 0 and a few tables; layer 7 may be missing.
    return config, check_tensors(found, expected_tensors(config), str(path)), notes, arguments


def stretched_distance(max_positions: int) -> int:
    """Return the largest distance that annotated-mpnet derives from a number of positions."""
    scaled = max(128, 128 * max_positions // 512)
    return (scaled + 7) // 8 * 8


def _arguments(document: Mapping[str, object]) -> Arguments:
    """Return the arguments in the file as a dictionary; empty if there are none.

    Three places, by age: `args`, a Namespace; `args`, a dictionary; `cfg`, a part per component.

    >>> _arguments({"args": None, "cfg": {"model": Namespace(dropout=0.1)}})
    {'dropout': 0.1}
    """
    arguments = document.get("args")
    if arguments is None:
        cfg = document.get("cfg")
        arguments = cfg.get("model") if isinstance(cfg, Mapping) else None
    if isinstance(arguments, Namespace):
        return vars(arguments)
    return arguments if isinstance(arguments, Mapping) else {}


def _untie(found: dict[str, Tensor], path: Path) -> None:
    """Drop the second name of the tied embedding from `found`, if both hold the same numbers."""
    tied = found.pop("lm_head.weight", None)
    table = found.get(f"{ENCODER}.embed_tokens.weight")
    if tied is not None and table is not None and not torch.equal(tied, table):
        raise CheckpointError(
            f"{path}: lm_head.weight differs from the token embeddings, with which MPNet's head "
            "shares it; this is another kind of model"
        )


def _config(found: Mapping[str, Tensor], arguments: Arguments, path: Path) -> ModelConfig:
    """Put together what the shapes show and what only the arguments tell.

    >>> _config(expected_tensors(ModelConfig()), {}, Path("model.pt")) == ModelConfig()
    True

    Raises:
        CheckpointError: a tensor that every MPNet has is missing, or nothing tells the heads.
        TypeError, ValueError, IndexError: numbers that do not describe a network.
    """
    if f"{ENCODER}.final_layer_norm.weight" in found:
        raise CheckpointError(
            f"{path} is a pre-norm model of a later annotated-mpnet, which normalises the "
            "embeddings and has a separate final norm: neither fairseq's network nor ours; train "
            "it again here, with or without --normalize-before"
        )
    vocab_size, embed_dim = _shape(found, f"{ENCODER}.embed_tokens.weight", path)
    table_rows, _ = _shape(found, f"{ENCODER}.embed_positions.weight", path)
    ffn_dim, _ = _shape(found, f"{ENCODER}.layers.0.fc1.weight", path)
    # A gap among the layers shows as missing tensors later.
    numbers = [re.match(rf"{ENCODER}\.layers\.(\d+)\.", name) for name in found]
    layers = 1 + max(int(number[1]) for number in numbers if number is not None)
    # The bias table is heads wide.
    buckets, heads = 0, arguments.get("encoder_attention_heads")
    if f"{ENCODER}.relative_attention_bias.weight" in found:
        buckets, heads = _shape(found, f"{ENCODER}.relative_attention_bias.weight", path)
    if not isinstance(heads, int):
        raise CheckpointError(
            f"{path}: the number of attention heads shows neither in the tensors (there is no "
            "relative position bias) nor in 'args'; add it to the file: "
            "document['args'] = {'encoder_attention_heads': 12}, then torch.save"
        )
    # rows = positions + padding id + 1. Without the positions, the padding id is 1, as in the
    # released weights.
    told = arguments.get("max_positions")
    pad_token_id = table_rows - told - 1 if isinstance(told, int) else 1
    max_positions = table_rows - pad_token_id - 1
    return ModelConfig(
        vocab_size=vocab_size,
        max_positions=max_positions,
        pad_token_id=pad_token_id,
        encoder_layers=layers,
        encoder_embed_dim=embed_dim,
        encoder_ffn_dim=ffn_dim,
        encoder_attention_heads=heads,
        dropout=_number(arguments, "dropout", ModelConfig.dropout),
        attention_dropout=_number(arguments, "attention_dropout", ModelConfig.attention_dropout),
        activation_dropout=_number(arguments, "activation_dropout", ModelConfig.activation_dropout),
        activation_fn=cast(ActivationName, arguments.get("activation_fn", "gelu")),
        normalize_before=bool(arguments.get("normalize_before", False)),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=_max_distance(arguments, max_positions),
    )


def _shape(found: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    if name not in found or found[name].ndim != 2:
        raise CheckpointError(
            f"{path} has no matrix {name!r}, which every MPNet of fairseq has; it is another kind "
            "of model, or incomplete"
        )
    rows, columns = found[name].shape
    return rows, columns


def _number(arguments: Arguments, name: str, default: float) -> float:
    value = arguments.get(name, default)
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}")
    return value


def _max_distance(arguments: Arguments, max_positions: int) -> int:
    # Absent means fairseq, which has 128 in its code. None means annotated-mpnet's stretched one.
    distance = arguments.get("relative_attention_max_distance", 128)
    if distance is None:
        return stretched_distance(max_positions)
    if not isinstance(distance, int):
        raise TypeError(f"relative_attention_max_distance is {distance!r}")
    return distance
