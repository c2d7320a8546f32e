"""One way in for weights of any kind: what is this path?

What is there decides, not what it is called:

    a directory with manifest.json or state.json     a checkpoint of ours
    a directory with best_checkpoint or checkpointN  a run of ours: its best, else its newest
    a directory with config.json or modules.json     Hugging Face, sentence-transformers
    a file                                           a .pt file of fairseq or annotated-mpnet
    nothing, but it ends in .pt                      our directory of that name without .pt
    nothing                                          perhaps a name on the Hub

The order decides where two answers would fit. **What is recognised and damaged is an error**, not
tried as something else: if a run's best checkpoint is broken, converting the newest would publish
another network than its user thinks.

The tokenizer travels with the weights where it can: in our checkpoints, beside a Hugging Face
model, beside annotated-mpnet's first checkpoint or as a name in its arguments. fairseq's files do
not know theirs. Ids without their vocabulary are not a model, so a missing tokenizer is an error
unless `--no-save-tokenizer` says that it is meant.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from annotated_mpnet.checkpoints.checkpoint import BEST, STATE, TOKENIZER, load_checkpoint
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.conversion.export import ExportReport, export_to_hugging_face
from annotated_mpnet.conversion.hugging_face import HUB_NAME, locate, read_directory
from annotated_mpnet.conversion.pt_files import read_pt_file
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import load_tokenizer

# Either is enough: a checkpoint that lost one of the two is damaged, not foreign.
OURS = (STATE, "manifest.json")
HUGGING_FACE = ("config.json", "modules.json", "0_Transformer")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")


class LoadedWeights(NamedTuple):
    """A network read from anywhere.

    Attributes:
        config: its numbers.
        tensors: its state, complete, in float32, under our names.
        notes: for the user: what was made up, what was left out.
        tokenizer: directory or Hub name of its tokenizer; None if unknown.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: list[str]
    tokenizer: str | None


def load_any(path_or_name: str) -> LoadedWeights:
    """Read a network from a path, or a name on the Hub, of any of the kinds above.

    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> config = ModelConfig(vocab_size=99, encoder_embed_dim=24, encoder_ffn_dim=32)
    >>> with TemporaryDirectory() as folder:
    ...     state = {"model_states": MPNetForPretraining(config).state_dict()}
    ...     torch.save({"args": {"tokenizer_name": "some/name"}, **state}, f"{folder}/old.pt")
    ...     loaded = load_any(f"{folder}/old.pt")
    >>> loaded.config == config, len(loaded.tensors), loaded.tokenizer
    (True, 154, 'some/name')

    Raises:
        CheckpointError: none of these, damaged, or not a network that ours can be.
    """
    path = Path(path_or_name)
    # A command written for annotated-mpnet names a file; here the same name is a directory.
    if path.suffix == ".pt" and not path.exists() and path.with_suffix("").is_dir():
        path = path.with_suffix("")
    if path.is_dir():
        return _load_directory(path)
    if path.is_file():
        return _load_pt_file(path)
    if path.suffix != ".pt" and HUB_NAME.fullmatch(path_or_name) is not None:
        return _load_hugging_face(path_or_name)
    raise CheckpointError(
        f"{path_or_name!r} does not exist; expected a checkpoint, a run's directory, a Hugging "
        "Face model (directory or Hub name), or a .pt file of fairseq or annotated-mpnet"
    )


def convert_checkpoint(
    path: Path, directory: Path, *, save_tokenizer: bool, overwrite: bool, pytorch_bin: bool
) -> ExportReport:
    """Read a network of any kind and export it: the command `convert-to-hf`.

    Prints notes and what was proved after the export, so a failure is not buried under them.

    Args:
        path: a path, or a name on the Hub.
        directory: the target; absent or empty, unless `overwrite`.
        save_tokenizer: write the tokenizer too; False also allows weights that come without one.
        overwrite: replace an older Hugging Face model there.
        pytorch_bin: also write `pytorch_model.bin`.

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
    """Return a network's tokenizer; None if it is unknown and not needed.

    It is read even if it is not written: it tells how many rows of the vocabulary are tokens.
    """
    try:
        if loaded.tokenizer is None:
            raise ConfigError("the tokenizer of these weights is unknown")
        return load_tokenizer(loaded.tokenizer)
    except ConfigError as error:
        if needed:
            raise ConfigError(f"{error}; or export without one: --no-save-tokenizer") from error
        return None


def _load_directory(path: Path) -> LoadedWeights:
    is_checkpoint = any((path / name).exists() for name in OURS)
    # The best one first, then the rest by number: checkpoint10 after checkpoint9.
    for checkpoint in [path] if is_checkpoint else [path / BEST, *newest_first(path)]:
        if checkpoint.is_dir():
            return _load_ours(checkpoint)
    if any((path / name).exists() for name in HUGGING_FACE):
        return _load_hugging_face(str(path))
    raise CheckpointError(
        f"{path} holds no model: neither a checkpoint (manifest.json), nor a run "
        "(best_checkpoint), nor a Hugging Face model (config.json); for a .pt file, give the file"
    )


def _load_ours(directory: Path) -> LoadedWeights:
    checkpoint = load_checkpoint(directory, with_optimizer=False)
    tokenizer = _tokenizer_in(directory / TOKENIZER)
    return LoadedWeights(checkpoint.model_config, dict(checkpoint.model_tensors), [], tokenizer)


def _load_hugging_face(directory_or_name: str) -> LoadedWeights:
    # In a sentence-transformers directory, the tokenizer is where the network is.
    directory = locate(directory_or_name)
    return LoadedWeights(*read_directory(directory), _tokenizer_in(directory))


def _load_pt_file(path: Path) -> LoadedWeights:
    config, tensors, notes, arguments = read_pt_file(path)
    # The directory first: a name may mean something else today, or need a connection.
    tokenizer = _tokenizer_in(path.parent / "tokenizer")
    name = arguments.get("tokenizer_name")
    if tokenizer is None and isinstance(name, str):
        tokenizer = name
    return LoadedWeights(config, tensors, notes, tokenizer)


def _tokenizer_in(directory: Path) -> str | None:
    """Return the directory if it holds a tokenizer."""
    return str(directory) if any((directory / name).exists() for name in TOKENIZER_FILES) else None
