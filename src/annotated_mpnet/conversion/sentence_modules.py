"""The modules of a sentence encoder, which turn hidden states into one vector for each text.

A directory of sentence-transformers is a network and what comes after it. all-mpnet-base-v2:

    modules.json                       Transformer, Pooling, Normalize, in this order
    sentence_bert_config.json          cut texts after 384 tokens
    config_sentence_transformers.json  prompts, similarity function
    1_Pooling/config.json              the mean over the tokens
    2_Normalize/                       (nothing to say)

Pretraining uses and changes none of this, so a run keeps it as a few small files: with each
checkpoint, until an export needs them. Without them sentence-transformers would take the mean and
not normalise it. No error, but with dot products all-mpnet-base-v2 falls from 0.834 to 0.780 on
STS-B.

In an export, the network is in the directory itself, the layout of today's sentence-transformers.
Weights of a module (Dense) that are a pickle become safetensors.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import safetensors.torch
from torch import Tensor

from annotated_mpnet.conversion.foreign import SAFETENSORS, WAY_OUT, expect_format, read_pickle
from annotated_mpnet.errors import CheckpointError, shown
from annotated_mpnet.files.records import decode, reading, to_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""sentence-transformers reads the first of them that is there."""
NEEDED = {"Pooling": "config.json", "Dense": "model.safetensors"}
"""Kind of module -> the file without which it cannot be what it was."""
NO_LIMIT = 10**9


class _Module(msgspec.Struct):
    type: str
    path: str = ""

    @property
    def is_transformer(self) -> bool:
        return self.type.endswith("Transformer")


def transformer_in(directory: Path) -> Path:
    """Return where the network of a sentence-transformers directory is; other directories as given.

    Versions before 2 had it in 0_Transformer.
    """
    path = directory / MODULES
    if not path.is_file():
        old_layout = directory / "0_Transformer"
        return old_layout if (old_layout / "config.json").is_file() else directory
    for module in decode(path, list[_Module]):
        if module.is_transformer:
            return _inside(directory, module.path, path)
    raise CheckpointError(f"{path} names no Transformer module inside the directory; {WAY_OUT}")


def read_modules(directory: Path, max_positions: int) -> tuple[dict[str, bytes], list[str]]:
    """Return the modules of a sentence-transformers directory as an export's files, and notes.

    Args:
        directory: any directory with a network; without a modules.json there are no modules.
        max_positions: of the network.

    Raises:
        CheckpointError: a module is missing or damaged.
    """
    path = directory / MODULES
    if not path.is_file():
        return {}, []
    modules = decode(path, list[_Module])
    # Theirs come with the library; any other takes code from the directory.
    foreign = [each.type for each in modules if not each.type.startswith("sentence_transformers.")]
    if foreign:
        return {}, [
            f"{path}: the module {shown(foreign[0])} needs code of its own; exports keep none of "
            "the modules, so sentence-transformers will compute other vectors"
        ]
    files, entries = {}, decode(path, list[dict[str, Any]])
    if (directory / SETTINGS).is_file():
        decode(directory / SETTINGS, dict[str, object])
        files[SETTINGS] = (directory / SETTINGS).read_bytes()
    transformer = transformer_in(directory)
    name, settings = _transformer_settings(transformer, max_positions)
    files[name] = to_json(settings).encode()
    network = next(each for each in modules if each.is_transformer)
    for index, (module, entry) in enumerate(zip(modules, entries, strict=True)):
        entry["path"] = ""
        folder = _inside(directory, module.path, path)
        if module is network or folder in (directory, transformer):
            continue
        entry["path"] = f"{index}_{module.type.rpartition('.')[2]}"
        own = _files_of(folder)
        needed = NEEDED.get(entry["path"].partition("_")[2])
        if needed is not None and needed not in own:
            raise CheckpointError(
                f"{folder / needed} is missing, and {path} names its module; copy the whole "
                f"directory, or take {MODULES} out of it to start from the network alone"
            )
        files |= {f"{entry['path']}/{file}": content for file, content in own.items()}
    files[MODULES] = to_json(entries).encode()
    kinds = ", ".join(each.type.rpartition(".")[2] for each in modules)
    return files, [
        f"{path}: exports keep the modules of sentence-transformers ({kinds}; texts are cut after "
        f"{settings['max_seq_length']} tokens)"
    ]


def is_module_file(name: str) -> bool:
    """Return whether a name may be a file of modules in an export.

    >>> is_module_file("1_Pooling/config.json"), is_module_file("2_Dense/model.safetensors")
    (True, True)
    >>> is_module_file("config.json"), is_module_file("1_Pooling/../config.json")
    (False, False)
    """
    if name in (MODULES, SETTINGS, *TRANSFORMER_SETTINGS):
        return True
    folder, _, file = name.partition("/")
    return (
        re.fullmatch(r"[0-9]_[A-Z]\w*", folder) is not None
        and PurePosixPath(file).suffix in (".json", ".txt", ".model", ".safetensors")
        and ".." not in PurePosixPath(file).parts
    )


def _inside(directory: Path, name: str, source: Path) -> Path:
    # The path comes from a file: it must not lead out of its directory.
    inner = directory / name
    if inner.resolve().is_relative_to(directory.resolve()):
        return inner
    raise CheckpointError(
        f"{source} names the module {shown(name)}, which is not inside the directory; {WAY_OUT}"
    )


def _transformer_settings(transformer: Path, max_positions: int) -> tuple[str, dict[str, object]]:
    """Return the file of the Transformer's settings, with the length at which texts are cut.

    Newer versions of sentence-transformers keep the length with the tokenizer, whose length in an
    export is that of the position table.
    """
    found = [name for name in TRANSFORMER_SETTINGS if (transformer / name).is_file()]
    settings = decode(transformer / found[0], dict[str, object]) if found else {}
    limit = settings.get("max_seq_length")
    for key in ("tokenizer_args", "processor_kwargs"):
        own = settings.get(key)
        if isinstance(own, dict):
            limit = own.pop("model_max_length", limit)
    if limit is None and (transformer / "tokenizer_config.json").is_file():
        described = decode(transformer / "tokenizer_config.json", dict[str, object])
        limit = described.get("model_max_length")
    if isinstance(limit, bool) or not isinstance(limit, int | float | None) or (limit or 1) < 1:
        raise CheckpointError(
            f"{transformer} cuts texts after {shown(limit)} tokens (max_seq_length); expected "
            "a number of at least 1"
        )
    settings.pop("tokenizer_name_or_path", None)  # an export has its own
    settings["max_seq_length"] = int(min(limit or NO_LIMIT, max_positions))
    return (found or TRANSFORMER_SETTINGS)[0], settings


def _files_of(folder: Path) -> dict[str, bytes]:
    """Return the settings and weights of one module, by their path in its folder.

    A module without settings (Normalize) has an empty folder, or none.
    """
    files: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        if path.suffix == ".bin" and not path.with_name("model.safetensors").exists():
            weights = read_pickle(path)
            if not isinstance(weights, Mapping) or not all(
                isinstance(each, Tensor) for each in weights.values()
            ):
                raise CheckpointError(f"{path} holds no named tensors; {WAY_OUT}")
            name = str(PurePosixPath(name).with_name("model.safetensors"))
            with reading(path):
                plain = {str(key): each.contiguous() for key, each in weights.items()}
                files[name] = safetensors.torch.save(plain, metadata={"format": "pt"})
        elif is_module_file(f"0_Module/{name}"):
            if path.suffix == ".safetensors":
                expect_format(path, SAFETENSORS)
            with reading(path):
                files[name] = path.read_bytes()
    return files
