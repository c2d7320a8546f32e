"""Which of all these is it? One way in, for `convert-to-hf` and for starting a run from weights.

What a path is shows in what is there, not in what it is called:

    a directory with manifest.json or state.json     a checkpoint of ours
    a directory with best_checkpoint or checkpointN  a run of ours: its best, else its newest
    a directory with config.json or modules.json     Hugging Face, sentence-transformers
    a file                                           fairseq's or annotated-mpnet's .pt
    nothing, but it ends in .pt                      our directory of that name without .pt, so that
                                                     `checkpoint2500.pt` means `checkpoint2500` too
    nothing                                          perhaps a name on the Hub

Next: `cli.py`, which calls this.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from annotated_mpnet.config import ModelConfig
from annotated_mpnet.conversion.export import ExportReport, export_to_hugging_face
from annotated_mpnet.conversion.fairseq import read_pt_file
from annotated_mpnet.conversion.hugging_face import HUB_NAME, locate, read_directory
from annotated_mpnet.data.tokenizer import load_tokenizer
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.modeling import MPNetForPretraining
from annotated_mpnet.training.checkpoint import (
    BEST,
    NUMBERED,
    STATE,
    TOKENIZER,
    load_checkpoint,
)

OURS = (STATE, "manifest.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")


class LoadedWeights(NamedTuple):
    """A network read from anywhere.

    Attributes:
        config: its numbers.
        tensors: its state, complete, in float32, under our names.
        notes: what the user should know: what was made up, what was left aside.
        tokenizer: directory or Hub name of its tokenizer; None if nothing tells.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: list[str]
    tokenizer: str | None


def load_any(path_or_name: str) -> LoadedWeights:
    """Read a network from a path, or a name on the Hub, of any of the kinds above.

    Raises:
        CheckpointError: none of these, damaged, or not a network that we can represent.
    """
    path = Path(path_or_name)
    if path.suffix == ".pt" and not path.exists() and path.with_suffix("").is_dir():
        path = path.with_suffix("")
    if path.is_dir():
        return _load_directory(path)
    if path.is_file():
        return _load_pt_file(path)
    if path.suffix != ".pt" and HUB_NAME.fullmatch(path_or_name) is not None:
        return _load_hugging_face(path_or_name)
    raise CheckpointError(
        f"{path_or_name!r} does not exist; expected a checkpoint or run of ours, a Hugging Face "
        "model (directory or Hub name), or a .pt file of fairseq or annotated-mpnet"
    )


def convert_checkpoint(
    path: Path, directory: Path, *, save_tokenizer: bool, overwrite: bool, pytorch_bin: bool
) -> ExportReport:
    """Read a network of any kind and export it: the command `convert-to-hf`.

    Prints what the user should know and what was proved.

    Raises:
        CheckpointError, ConfigError, WriteError: see `load_any` and `export_to_hugging_face`.
    """
    loaded = load_any(str(path))
    model = MPNetForPretraining(loaded.config)
    model.load_state_dict(loaded.tensors)
    report = export_to_hugging_face(
        model,
        directory,
        tokenizer=_tokenizer_of(loaded, save_tokenizer),
        overwrite=overwrite,
        pytorch_bin=pytorch_bin,
        save_tokenizer=save_tokenizer,
    )
    for note in loaded.notes:
        print(note)
    if report.vocabulary_cut:
        print(f"left out {report.vocabulary_cut} embeddings that stand for no token")
    print(f"wrote {report.directory}: {', '.join(file.name for file in report.files)}")
    print(f"opened it again: logits differ by {report.max_difference:.1e} at most")
    return report


def _tokenizer_of(loaded: LoadedWeights, needed: bool) -> PreTrainedTokenizerBase | None:
    """Return a network's tokenizer; None if it is not needed and nobody has it."""
    try:
        if loaded.tokenizer is None:
            raise ConfigError("nothing tells which tokenizer belongs to these weights")
        return load_tokenizer(loaded.tokenizer)
    except ConfigError as error:
        if needed:
            raise ConfigError(f"{error}; or export without one: --no-save-tokenizer") from error
        return None


def _load_directory(path: Path) -> LoadedWeights:
    if any((path / name).exists() for name in OURS):
        return _load_ours(path)
    if (path / BEST).is_dir():
        return _load_ours(path / BEST)
    numbered = [
        (int(number[1]), child)
        for child in path.iterdir()
        if (number := NUMBERED.fullmatch(child.name)) is not None and child.is_dir()
    ]
    if numbered:
        return _load_ours(max(numbered)[1])
    markers = ("config.json", "modules.json", "0_Transformer")
    if any((path / name).exists() for name in markers):
        return _load_hugging_face(str(path))
    raise CheckpointError(
        f"{path} holds no model: neither a checkpoint of ours (manifest.json), nor a run of ours "
        "(best_checkpoint), nor a Hugging Face model (config.json); for a .pt file, give the file"
    )


def _load_ours(directory: Path) -> LoadedWeights:
    checkpoint = load_checkpoint(directory, with_optimizer=False)
    tokenizer = _tokenizer_in(directory / TOKENIZER)
    return LoadedWeights(checkpoint.model_config, dict(checkpoint.model_tensors), [], tokenizer)


def _load_hugging_face(directory_or_name: str) -> LoadedWeights:
    directory = locate(directory_or_name)
    return LoadedWeights(*read_directory(directory), _tokenizer_in(directory))


def _load_pt_file(path: Path) -> LoadedWeights:
    config, tensors, notes, arguments = read_pt_file(path)
    # annotated-mpnet saves the tokenizer beside its first checkpoint, and its name in each.
    tokenizer = _tokenizer_in(path.parent / "tokenizer")
    name = arguments.get("tokenizer_name")
    if tokenizer is None and isinstance(name, str):
        tokenizer = name
    return LoadedWeights(config, tensors, notes, tokenizer)


def _tokenizer_in(directory: Path) -> str | None:
    return str(directory) if any((directory / name).exists() for name in TOKENIZER_FILES) else None
