"""Files of other programs: what they are, whether they are read safely, whether they are complete.

A stranger's file may be anything. Three rules hold for all readers of this room:

1. No code in it is run. `weights_only` unpickles a harmless subset; JSON and safetensors are data.
2. Whatever goes wrong is one line that names the file (`files/records.py`).
3. A network is exactly the tensors that its configuration describes, or it is refused
   (`checked`). A network with a few random layers trains without complaint and is only worse.
   Shapes are compared before any memory is allocated for them.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from annotated_mpnet.conversion.model_card import CardFacts
from annotated_mpnet.errors import CheckpointError, shown
from annotated_mpnet.files.records import reading
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining

PYTORCH, SAFETENSORS = "a PyTorch file", "a safetensors file"
SIGNATURES = {
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",): PYTORCH,  # before version 1.6
    # Of the newer protocols and of the first, which is text.
    (b"\x80", b"(dp0\n", b"(lp0\n", b"c__builtin__\n", b"ccopy_reg\n", b"cposix\n", b"cos\n"): (
        "a pickle, but not of torch.save (nothing in it was run)"
    ),
    (b"PK",): "a zip archive, but not of torch.save",
    (b"\x93NUMPY",): "a NumPy array",
    (b"\x89HDF",): "an HDF5 file, as of Keras or TensorFlow",
    (b"GGUF",): "a GGUF file",
    (b"version https://git-lfs",): "a Git LFS pointer (`git lfs pull` fetches the file itself)",
    (b"<",): "a web page or XML, not what was to be downloaded",
    # gzip, bzip2, xz, zstandard, and the headers of zlib, which joblib uses.
    (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"): "compressed",
    (b"x\x01", b"x^", b"x\x9c", b"x\xda"): "compressed",
}
"""First bytes of a file, several ways -> what it is."""
WAY_OUT = "give the directory or Hub name of an MPNet, for example microsoft/mpnet-base"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")


class LoadedWeights(NamedTuple):
    """A network read from anywhere.

    Attributes:
        config: its numbers. `mask_token_id` may be the default: the tokenizer knows it.
        tensors: its state, complete, in float32, under our names.
        notes: for the user: what was made up, what was left out.
        tokenizer: directory or Hub name of its tokenizer; None if unknown.
        modules: what sentence-transformers has after it, as files (`sentence_modules.py`).
        facts: what the model card says about its training, if it is a checkpoint of ours.
        fresh_head: whether the LM head was made up.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: list[str]
    tokenizer: str | None
    modules: Mapping[str, bytes] = MappingProxyType({})
    facts: CardFacts | None = None
    fresh_head: bool = False


def expect_format(path: Path, wanted: str) -> None:
    """Raise a `CheckpointError` that says what a file is, if it is not `PYTORCH`, `SAFETENSORS`."""
    with reading(path), path.open("rb") as file:
        start = file.read(4096)
    stripped = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    found = next((kind for each, kind in SIGNATURES.items() if stripped.startswith(each)), None)
    if start[4:9] == b"\0\0\0\0{":  # a header, after its length of less than 4 GB
        found = SAFETENSORS
    elif start.startswith(b"PK") and b"/data.pkl" in start:
        found = PYTORCH
    elif found is None and len(start) < 16:
        found = f"{len(start)} bytes long" if start else "empty"
    elif found is None:
        text = stripped.decode(errors="replace")
        plain = all(letter.isprintable() or letter.isspace() for letter in text)
        found = "text" if plain else "of an unknown format"
    if found != wanted:
        advice = ": give the directory of the model" if found == SAFETENSORS else ""
        raise CheckpointError(f"{path} cannot be read: it is {found}; expected {wanted}{advice}")


def read_pickle(path: Path) -> object:
    """Read a file of `torch.save` that holds plain data; no code in it is run.

    Raises:
        CheckpointError: it holds anything else (the message names it), or is damaged.
    """
    expect_format(path, PYTORCH)
    # PyTorch's warnings about a file are for programmers.
    with reading(path), warnings.catch_warnings(action="ignore"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            if foreign is None:
                raise
            raise CheckpointError(
                f"{path} holds {shown(foreign[1])}, which takes code to rebuild; nothing was "
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

    Args:
        found: in a file, under its names.
        expected: under the same names, perhaps on the `meta` device.
        source: for the messages.

    Raises:
        CheckpointError: names what is missing, unexpected, of another shape, or not finite.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    # Both lists in one message: side by side, a renamed tensor shows as what it is.
    if missing or unexpected:
        layers, wanted = _layers(found), _layers(expected)
        parts = [f"{layers} layers, expected {wanted}"] if layers != wanted else []
        parts += [f"{len(missing)} missing ({_listed(missing)})"] if missing else []
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
        with reading(f"{source}: {name!r}"):
            # A pickle may spread one number over a tensor of any size, or have none at all.
            if tensor.nbytes > tensor.untyped_storage().nbytes() or tensor.device.type != "cpu":
                raise ValueError("its numbers are not in the file")
            if not tensor.is_floating_point():
                raise ValueError(f"expected floating-point numbers, found {tensor.dtype}")
            plain[name] = tensor.float().contiguous()
            # One NaN makes every logit of every sentence NaN from the first update.
            if not bool(torch.isfinite(plain[name]).all()):
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


def _layers(names: Iterable[str]) -> int:
    found = [re.search(r"\blayers?\.(\d+)\.", name) for name in names]
    return len({layer[1] for layer in found if layer is not None})


def _listed(names: list[str]) -> str:
    """Name three of them, escaped and cut, and count the rest.

    >>> _listed(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    first = ", ".join(map(shown, names[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
