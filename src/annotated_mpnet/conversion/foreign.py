"""Files of other programs: what they are, whether they are read safely, whether they are complete.

A stranger's file may be anything. Three rules hold for all readers of this room:

1. No code in it is run. `weights_only` unpickles a harmless subset; JSON and safetensors are data.
2. Whatever goes wrong is one line that names the file (`reading`).
3. A network is exactly the tensors that its configuration describes, or it is refused
   (`checked`): a network with a few random layers trains on without complaint and is only worse.
   Shapes are compared before any memory is allocated for them.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from annotated_mpnet.errors import CheckpointError, UserError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

WAY_OUT = "give the directory or Hub name of an MPNet, for example microsoft/mpnet-base"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")


class LoadedWeights(NamedTuple):
    """A network read from anywhere.

    Attributes:
        config: its numbers. `mask_token_id` may be the default: the tokenizer knows it.
        tensors: its state, complete, in float32, under our names.
        notes: for the user: what was made up, what was left out.
        tokenizer: directory or Hub name of its tokenizer; None if unknown.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: list[str]
    tokenizer: str | None


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Turn whatever a damaged or foreign file causes into one `CheckpointError` that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} cannot be read: {type(error).__name__} {repr(str(error))[:160]}; it is "
            "damaged, or not what its name says"
        ) from error


def read_pickle(path: Path) -> object:
    """Read a file of `torch.save` that holds plain data; no code in it is run.

    Raises:
        CheckpointError: it holds anything else (the message names it), or is damaged.
    """
    with reading(path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            if foreign is None:
                raise
            raise CheckpointError(
                f"{path} holds {repr(foreign[1])[:80]}, which takes code to rebuild; nothing was "
                "run. If you trust it, save its plain tensors again where it was made: "
                "torch.save({'args': vars(args), 'model': model.state_dict()}, 'plain.pt')"
            ) from error


def expected_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the network's state under our names, on the `meta` device: shapes without data.

    >>> tuple(expected_tensors(ModelConfig())["sentence_encoder.embed_positions.weight"].shape)
    (514, 768)
    """
    with torch.device("meta"):
        return MPNetForPretraining(config).state_dict()


def checked(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """Return the tensors in float32 if they are exactly what is expected, and finite.

    Raises:
        CheckpointError: names what is missing, unexpected, of another shape, or not finite.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    # Both lists in one message: side by side, a renamed tensor shows as what it is.
    if missing or unexpected:
        parts = [f"{len(missing)} missing ({_listed(missing)})"] if missing else []
        parts += [f"{len(unexpected)} unexpected ({_listed(unexpected)})"] if unexpected else []
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
    plain = {}
    for name, tensor in found.items():
        with reading(f"{source}: {name}"):
            plain[name] = tensor.float().contiguous()
            # One NaN makes every logit of every sentence NaN from the first update.
            if not tensor.is_floating_point() or not bool(torch.isfinite(plain[name]).all()):
                raise CheckpointError(
                    f"{source}: {name} holds values that are not finite numbers; the run that "
                    "wrote it had diverged, or the file is damaged: take an earlier one"
                )
    return plain


def without_second_names(
    found: Mapping[str, Tensor], second_names: Mapping[str, str], source: Path
) -> dict[str, Tensor]:
    """Drop the second names of tied tensors, if both names hold the same numbers.

    Depending on the version that wrote it, a file has either name or both.

    >>> second_names = {"lm_head.decoder.bias": "lm_head.bias"}
    >>> list(without_second_names({"lm_head.decoder.bias": torch.zeros(3)}, second_names, Path()))
    ['lm_head.bias']
    """
    kept = dict(found)
    for second, first in second_names.items():
        tensor = kept.pop(second, None)
        if tensor is not None and not torch.equal(kept.setdefault(first, tensor), tensor):
            raise CheckpointError(
                f"{source}: {second} differs from {first}; MPNet's head shares them, so this is "
                "another kind of model"
            )
    return kept


def tokenizer_in(directory: Path) -> str | None:
    """Return the directory if it holds a tokenizer."""
    return str(directory) if any((directory / name).exists() for name in TOKENIZER_FILES) else None


def _listed(names: list[str]) -> str:
    """Name three of them, escaped and cut, and count the rest.

    >>> _listed(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    shown = ", ".join(repr(name)[:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
