"""Weights from `.pt` files: Microsoft's own, and those of annotated-mpnet.

Both are a dictionary, pickled by `torch.save`:

    fairseq           model         tensors, named decoder.sentence_encoder..., decoder.lm_head...
                      args          an argparse.Namespace (upstream, later: cfg, a dictionary)
                      extra_state   among other things a few stopwatches, as Python objects
    annotated-mpnet   model_states  tensors, named sentence_encoder..., lm_head...; with
                                    _orig_mod. before it if the model was compiled
                      args          a Namespace, later a dictionary

A pickle is a program, and loading it runs it. PyTorch's `weights_only` runs a harmless subset of
it, in which only listed classes may occur (`read_safely`). The list here is as short as the files
allow: Namespace, which can do nothing but hold values, and for the names of fairseq's three
stopwatches a class of our own that holds values too, so that fairseq need not be installed. A file
with anything else is refused.

**The architecture** is read from the tensors wherever they show it, since a tensor cannot be wrong
about its own shape (and fairseq and annotated-mpnet call the same width `encoder_ffn_embed_dim` and
`encoder_ffn_dim`). For MPNet-base:

    embed_tokens.weight              30527 x 768     vocabulary, width
    embed_positions.weight             514 x 768     512 positions, given the padding id
    layers.0.fc1.weight               3072 x 768     width of the feed-forward layer
    relative_attention_bias.weight      32 x 12      buckets, heads
    layers.11...., and no layers.12                  12 layers

Heads show nowhere else: q, k and v are 768 wide however they are divided, so that a wrong number of
heads loads without a complaint and computes nonsense. Only what no shape shows comes from `args`:
activation, pre-norm, dropout, the largest distance, the padding id; and the heads where there is no
bias table. `layer_norm_eps` is in neither: it is 1e-5 in the code of both.

`args` is written by the flags of some run, years ago. It is trusted for these few things, and
contradicted nowhere else: `encoder_layers` in it, say, is not read at all.

**annotated-mpnet** has two pitfalls. Unless told otherwise, it stretches the largest distance with
the sequence, and the number is written nowhere but in its code:

>>> [stretched_distance(positions) for positions in (512, 515, 516, 1024, 2048)]
[128, 128, 136, 256, 512]

With another distance the same 32 numbers stand for other distances, and nothing in the file is the
wrong shape. That is the second reason for reading `args`, and for refusing to guess.

And its later versions changed pre-norm: the embeddings are normalised *and* there is a separate
final norm. That network is neither fairseq's nor ours; it has a tensor that gives it away, and is
refused.

Next: `recognise.py`.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from annotated_mpnet.config import ActivationName, ModelConfig
from annotated_mpnet.conversion.hugging_face import read_safely
from annotated_mpnet.conversion.names import check_tensors, expected_tensors
from annotated_mpnet.errors import CheckpointError, ConfigError

ENCODER = "sentence_encoder"
PREFIX = re.compile(r"(_orig_mod\.|module\.|decoder\.)*")
"""What `torch.compile`, `DistributedDataParallel` and fairseq put before each name. In fairseq,
MPNet is a language model, and the network of a language model is called its decoder."""
METERS = ("AverageMeter", "StopwatchMeter", "TimeMeter")

Arguments = Mapping[str, object]


class _Meter:
    """Stands in for fairseq's stopwatches, which are read and thrown away.

    A class without methods: what the pickle sets on it are attributes, and nobody looks at them.
    """


def load_fairseq_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Read a `.pt` file of fairseq's or annotated-mpnet's.

    Returns:
        The network's configuration; its tensors in float32 under our names, complete; and what the
        user should know. `mask_token_id` is the tokenizer's to tell, and has its default here.

    Raises:
        CheckpointError: the file holds more than plain data (nothing of it is run), is damaged, or
            is not the whole of a network that we can represent.
    """
    return read_pt_file(path)[:3]


def read_pt_file(path: Path) -> tuple[ModelConfig, dict[str, Tensor], list[str], Arguments]:
    """Read a `.pt` file; also return the arguments of the run that wrote it.

    What wrappers put before the names goes, in any order and number:

    >>> PREFIX.sub("", "_orig_mod.module.lm_head.bias", count=1)
    'lm_head.bias'
    """
    # Allowed for this file only: the list is PyTorch's, and the whole process has one.
    stand_ins = [(_Meter, f"fairseq.meters.{name}") for name in METERS]
    with torch.serialization.safe_globals([Namespace, *stand_ins]):
        document = read_safely(path)
    document = document if isinstance(document, Mapping) else {}
    weights = document.get("model", document.get("model_states"))
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"{path} is no training checkpoint: expected a dictionary with 'model' (fairseq) or "
            "'model_states' (annotated-mpnet); for a pytorch_model.bin, give its directory"
        )
    found = {
        PREFIX.sub("", str(name), count=1): each
        for name, each in weights.items()
        if isinstance(each, Tensor)
    }
    _untie(found, path)
    # Weights alone: its optimizer numbers its parameters by position in another program's list, and
    # its data loader's state means nothing here. A run starts from them, it does not resume.
    arguments = _arguments(document)
    notes = []
    if not arguments:
        notes.append(f"{path}: no arguments in the file; assumed gelu, post-norm, distance 128")
    try:
        config = _config(found, arguments, path)
    # ModelConfig checks its own numbers; the others come of arguments that have another type.
    except (ConfigError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} describes no network of ours: {repr(str(error))[:200]}"
        ) from error
    # The configuration comes from these very tensors, and is still checked against all of them: it
    # was read from layer 0 and a few tables, and layer 7 may be another width, or missing.
    return config, check_tensors(found, expected_tensors(config), str(path)), notes, arguments


def stretched_distance(max_positions: int) -> int:
    """Return the largest distance that annotated-mpnet makes up for a number of positions.

    In proportion to 512, and up to the next multiple of 8: 516 positions give 129, so 136.
    """
    scaled = max(128, 128 * max_positions // 512)
    return (scaled + 7) // 8 * 8


def _arguments(document: Mapping[str, object]) -> Arguments:
    """Return what the file tells of the run, as a plain dictionary; empty if it tells nothing.

    Three places, by age: `args`, a Namespace; `args`, a dictionary; and since upstream fairseq is
    configured by files, `cfg`, with a part for each component, while `args` is there and None.

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
    """Drop the second name of the tied embedding, if it really is the same; changes `found`.

    fairseq's state dict has the shared matrix under both names. A head of its own would be a
    network that ours cannot be, with 23 million weights that training would quietly tie together.
    """
    tied = found.pop("lm_head.weight", None)
    table = found.get(f"{ENCODER}.embed_tokens.weight")
    if tied is not None and table is not None and not torch.equal(tied, table):
        raise CheckpointError(
            f"{path}: lm_head.weight differs from the token embeddings, with which MPNet's head "
            "shares it; this is another kind of model"
        )


def _config(found: Mapping[str, Tensor], arguments: Arguments, path: Path) -> ModelConfig:
    """Put together what the shapes show and what only the arguments tell.

    Of the base network the shapes alone show everything but what has its default:

    >>> _config(expected_tensors(ModelConfig()), {}, Path("model.pt")) == ModelConfig()
    True

    Raises:
        CheckpointError: a tensor that every MPNet has is missing, or nothing tells the heads.
        ConfigError, TypeError, ValueError, IndexError: numbers that describe no network.
    """
    # The layers have norms of this name, too; the one that gives it away stands beside them.
    if f"{ENCODER}.final_layer_norm.weight" in found:
        raise CheckpointError(
            f"{path} is a pre-norm model of a later annotated-mpnet, which normalises the "
            "embeddings and has a separate final norm: neither fairseq's network nor ours; train "
            "it anew, with or without --normalize-before"
        )
    vocab_size, embed_dim = _shape(found, f"{ENCODER}.embed_tokens.weight", path)
    table_rows, _ = _shape(found, f"{ENCODER}.embed_positions.weight", path)
    ffn_dim, _ = _shape(found, f"{ENCODER}.layers.0.fc1.weight", path)
    # Layers are counted by the last one; a gap before it shows as missing tensors, later.
    numbers = [re.match(rf"{ENCODER}\.layers\.(\d+)\.", name) for name in found]
    layers = 1 + max(int(number[1]) for number in numbers if number is not None)
    # The table is heads wide, so that where there is one the arguments are not asked.
    buckets, heads = 0, arguments.get("encoder_attention_heads")
    if f"{ENCODER}.relative_attention_bias.weight" in found:
        buckets, heads = _shape(found, f"{ENCODER}.relative_attention_bias.weight", path)
    if not isinstance(heads, int):
        raise CheckpointError(
            f"{path}: the number of attention heads shows neither in the tensors (there is no "
            "relative position bias) nor in 'args'; add it to the file: "
            "document['args'] = {'encoder_attention_heads': 12}, then torch.save"
        )
    # One equation, rows = positions + padding id + 1, and two unknowns: if the positions are not
    # told, the padding id is taken to be 1, as it is in the released weights.
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
    """Return the shape of a matrix that every MPNet of fairseq's has, or say that it has none.

    The first of them that is asked for is where BERT, GPT and classifiers on top of MPNet part
    from it: they have other names.
    """
    if name not in found or found[name].ndim != 2:
        raise CheckpointError(
            f"{path} has no matrix {name!r}, which every MPNet of fairseq's has; it is of another "
            "kind, or not whole"
        )
    rows, columns = found[name].shape
    return rows, columns


def _number(arguments: Arguments, name: str, default: float) -> float:
    """Return an argument that must be a number; `TypeError` if it is none."""
    value = arguments.get(name, default)
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}")
    return value


def _max_distance(arguments: Arguments, max_positions: int) -> int:
    """Return the largest distance that the network knows.

    fairseq has no such argument, and 128 in its code. annotated-mpnet has one, and None means
    "make it up".

    >>> [_max_distance(told, 1024) for told in ({}, {"relative_attention_max_distance": None})]
    [128, 256]
    """
    # Absent and None are two things: fairseq's 128, and annotated-mpnet's invention.
    distance = arguments.get("relative_attention_max_distance", 128)
    if distance is None:
        return stretched_distance(max_positions)
    if not isinstance(distance, int):
        raise TypeError(f"relative_attention_max_distance is {distance!r}")
    return distance
