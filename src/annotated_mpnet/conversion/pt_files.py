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

import msgspec
import torch
from torch import Tensor

from annotated_mpnet.conversion.foreign import (
    LoadedWeights,
    checked,
    expected_tensors,
    read_pickle,
    tokenizer_in,
    without_second_names,
)
from annotated_mpnet.errors import CheckpointError, shown
from annotated_mpnet.files.records import reading
from annotated_mpnet.mpnet.config import ActivationName, ModelConfig

ENCODER = "sentence_encoder"
PREFIX = re.compile(r"(_orig_mod\.|module\.|decoder\.)*")
"""What `torch.compile`, `DistributedDataParallel` and fairseq put before each name. In fairseq,
MPNet is a language model, and the network of a language model is called its decoder."""
METERS = ("AverageMeter", "StopwatchMeter", "TimeMeter")


class _Meter:
    """Replaces fairseq's stopwatches, which are read and thrown away."""


class _Arguments(msgspec.Struct):
    """What no shape shows. Defaults are fairseq's, or those of MPNet-base."""

    encoder_attention_heads: int | None = None
    max_positions: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    activation_fn: ActivationName = "gelu"
    normalize_before: bool | None = False
    relative_attention_max_distance: int | None = 128
    tokenizer_name: str | None = None


def read_pt_file(path: Path) -> LoadedWeights:
    """Read a `.pt` file of fairseq or annotated-mpnet.

    Raises:
        CheckpointError: the file holds more than plain data (nothing of it is run), is damaged, or
            is not the whole of a network that we can represent.
    """
    # Allowed for this file only: PyTorch has one list for the whole process.
    stand_ins = [(_Meter, f"fairseq.meters.{name}") for name in METERS]
    with torch.serialization.safe_globals([Namespace, *stand_ins]):
        document = read_pickle(path)
    document = document if isinstance(document, Mapping) else {}
    weights = document.get("model", document.get("model_states"))
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"{path} is not a training checkpoint: expected a dictionary with 'model' (fairseq) or "
            "'model_states' (annotated-mpnet); for a pytorch_model.bin, give its directory"
        )
    found: dict[str, Tensor] = {}
    for name, each in weights.items():
        name = PREFIX.sub("", str(name), count=1)
        if isinstance(each, Tensor) and found.setdefault(name, each) is not each:
            raise CheckpointError(f"{path} holds {shown(name)} twice, with different prefixes")
    found = without_second_names(found, {"lm_head.weight": f"{ENCODER}.embed_tokens.weight"}, path)
    told = _arguments(document)
    notes = []
    if not told:
        notes.append(f"{path}: no arguments in the file; assumed gelu, post-norm, distance 128")
    with reading(path):
        arguments = msgspec.convert(told, _Arguments)
        config = _config(found, arguments, path)
    # The configuration was read from layer 0 and a few tables; layer 7 may be missing.
    tensors = checked(found, expected_tensors(config), path)
    # The directory first: a name may mean something else today, or need a connection.
    tokenizer = tokenizer_in(path.parent / "tokenizer") or arguments.tokenizer_name
    return LoadedWeights(config, tensors, notes, tokenizer)


def stretched_distance(max_positions: int) -> int:
    """Return the largest distance that annotated-mpnet derives from a number of positions."""
    scaled = max(128, 128 * max_positions // 512)
    return (scaled + 7) // 8 * 8


def _arguments(document: Mapping[str, object]) -> Mapping[str, object]:
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


def _config(found: Mapping[str, Tensor], arguments: _Arguments, path: Path) -> ModelConfig:
    """Put together what the shapes show and what only the arguments tell.

    >>> _config(expected_tensors(ModelConfig()), _Arguments(), Path()) == ModelConfig()
    True

    Raises:
        CheckpointError: a tensor that every MPNet has is missing, or nothing tells the heads.
        Exception: numbers that do not describe a network.
    """
    if f"{ENCODER}.final_layer_norm.weight" in found:
        raise CheckpointError(
            f"{path} is a pre-norm model of a later annotated-mpnet, which normalises the "
            "embeddings and has a separate final norm: neither fairseq's network nor ours; train "
            "it again here, with or without --normalize-before"
        )
    vocab_size, embed_dim = _shape(found, "embed_tokens", path)
    table_rows, _ = _shape(found, "embed_positions", path)
    ffn_dim, _ = _shape(found, "layers.0.fc1", path)
    # A gap among the layers shows as missing tensors later.
    numbers = [re.match(rf"{ENCODER}\.layers\.(\d+)\.", name) for name in found]
    layers = 1 + max(int(number[1]) for number in numbers if number is not None)
    # The bias table is heads wide.
    buckets, heads = 0, arguments.encoder_attention_heads
    if f"{ENCODER}.relative_attention_bias.weight" in found:
        buckets, heads = _shape(found, "relative_attention_bias", path)
    if heads is None:
        raise CheckpointError(
            f"{path}: the number of attention heads shows neither in the tensors (there is no "
            "relative position bias) nor in 'args'; add it to the file: "
            "document['args'] = {'encoder_attention_heads': 12}, then torch.save"
        )
    # rows = positions + padding id + 1. Without the positions, the padding id is 1, as in the
    # released weights.
    max_positions = arguments.max_positions
    if max_positions is None:
        max_positions = table_rows - 2
    # Absent means fairseq, which has 128 in its code. None means annotated-mpnet's stretched one.
    distance = arguments.relative_attention_max_distance
    if distance is None:
        distance = stretched_distance(max_positions)
    return ModelConfig(
        vocab_size=vocab_size,
        max_positions=max_positions,
        pad_token_id=table_rows - max_positions - 1,
        encoder_layers=layers,
        encoder_embed_dim=embed_dim,
        encoder_ffn_dim=ffn_dim,
        encoder_attention_heads=heads,
        dropout=arguments.dropout,
        attention_dropout=arguments.attention_dropout,
        activation_dropout=arguments.activation_dropout,
        activation_fn=arguments.activation_fn,
        normalize_before=bool(arguments.normalize_before),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
    )


def _shape(found: Mapping[str, Tensor], module: str, path: Path) -> tuple[int, int]:
    name = f"{ENCODER}.{module}.weight"
    if name not in found or found[name].ndim != 2:
        raise CheckpointError(
            f"{path} has no matrix {name!r}, which every MPNet of fairseq has; it is another kind "
            "of model, or incomplete"
        )
    rows, columns = found[name].shape
    return rows, columns
