"""Which of all these is it? One way in, for `convert-to-hf` and for starting a run from weights.

What a path is shows in what is there, not in what it is called:

    a directory with manifest.json or state.json     a checkpoint of ours
    a directory with best_checkpoint or checkpointN  a run of ours: its best, else its newest
    a directory with config.json or modules.json     Hugging Face, sentence-transformers
    a file                                           fairseq's or annotated-mpnet's .pt
    nothing, but it ends in .pt                      our directory of that name without .pt, so that
                                                     `checkpoint2500.pt` means `checkpoint2500` too
    nothing                                          perhaps a name on the Hub

The order of the questions decides what two answers would. A checkpoint of ours has a config.json
too, so that ours come before Hugging Face's. And a path that is there is never taken for a name on
the Hub, so that no run depends on whether somebody has registered `checkpoints`.

**What is recognised is not passed on when it turns out to be damaged.** A directory with a manifest
is a checkpoint of ours, whole or an error; it is not tried as something else until something fits.
A run's best checkpoint that is broken is an error too, rather than a reason to convert the
newest: its user would publish another network than he thinks.

A run's directory, and what each path in it means:

    checkpoints/mine                      best_checkpoint, if there is one; else checkpoint500
    checkpoints/mine/checkpoint400        that one
    checkpoints/mine/checkpoint400.pt     the same, as an old command line writes it
    checkpoints/mine/hf                   the export, as Hugging Face's

All of them end up as the same four things, `LoadedWeights`, and nothing after this file knows where
a network came from. `convert-to-hf` is then two steps, whatever it was given: read, export.

**The tokenizer** travels with the weights where it can: inside of our checkpoints, beside the
weights in a Hugging Face directory, beside the first checkpoint of annotated-mpnet or as a name in
its arguments. fairseq's files know nothing of theirs. Ids without the vocabulary that they number
are no model, so that a missing tokenizer is an error unless it is said to be meant.

Next: `cli.py`, which calls this.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from annotated_mpnet.checkpoints.checkpoint import BEST, STATE, TOKENIZER, load_checkpoint
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.conversion.export import ExportReport, export_to_hugging_face
from annotated_mpnet.conversion.fairseq import read_pt_file
from annotated_mpnet.conversion.hugging_face import HUB_NAME, locate, read_directory
from annotated_mpnet.errors import CheckpointError, ConfigError
from annotated_mpnet.mpnet.config import ModelConfig
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import load_tokenizer

# Either is enough: a checkpoint that lost one of the two is to be called damaged, not foreign.
OURS = (STATE, "manifest.json")
HUGGING_FACE = ("config.json", "modules.json", "0_Transformer")
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

    Only a name on the Hub touches the network, and only if nothing here has that name.

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
        CheckpointError: none of these, damaged, or not a network that we can represent.
    """
    path = Path(path_or_name)
    # A command line written for annotated-mpnet names a file; here the same name is a directory.
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

    Prints what the user should know and what was proved: after the export, so that a failure is
    not buried under the remarks of a success.

    Args:
        path: a path, or a name on the Hub.
        directory: where to; absent or empty, unless `overwrite`.
        save_tokenizer: write the tokenizer too; False also allows weights that come without one.
        overwrite: replace an older Hugging Face model there.
        pytorch_bin: write `pytorch_model.bin` too.

    Raises:
        CheckpointError, ConfigError, WriteError: see `load_any` and `export_to_hugging_face`.
    """
    # Into a network of ours first, strictly: what does not fit must fail here, not in the proof.
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
    """Return a network's tokenizer; None if it is not needed and nobody has it.

    Even if it is not to be written it is asked for: it tells how many rows of the vocabulary are
    tokens, and which ids begin and end a sentence.
    """
    try:
        if loaded.tokenizer is None:
            raise ConfigError("nothing tells which tokenizer belongs to these weights")
        return load_tokenizer(loaded.tokenizer)
    except ConfigError as error:
        if needed:
            raise ConfigError(f"{error}; or export without one: --no-save-tokenizer") from error
        return None


def _load_directory(path: Path) -> LoadedWeights:
    """Ours, of which a run has several; else Hugging Face's."""
    is_checkpoint = any((path / name).exists() for name in OURS)
    # The best one first, then the rest by number: checkpoint10 after checkpoint9.
    for checkpoint in [path] if is_checkpoint else [path / BEST, *newest_first(path)]:
        if checkpoint.is_dir():
            return _load_ours(checkpoint)
    # No checkpoint of ours, nor any below: then it is what its own files say.
    if any((path / name).exists() for name in HUGGING_FACE):
        return _load_hugging_face(str(path))
    raise CheckpointError(
        f"{path} holds no model: neither a checkpoint of ours (manifest.json), nor a run of ours "
        "(best_checkpoint), nor a Hugging Face model (config.json); for a .pt file, give the file"
    )


def _load_ours(directory: Path) -> LoadedWeights:
    # Without the means of AdamW: two thirds of the bytes, and a checkpoint may come without them.
    checkpoint = load_checkpoint(directory, with_optimizer=False)
    tokenizer = _tokenizer_in(directory / TOKENIZER)
    return LoadedWeights(checkpoint.model_config, dict(checkpoint.model_tensors), [], tokenizer)


def _load_hugging_face(directory_or_name: str) -> LoadedWeights:
    # Found once: of a sentence-transformers directory both parts are where its network is.
    directory = locate(directory_or_name)
    return LoadedWeights(*read_directory(directory), _tokenizer_in(directory))


def _load_pt_file(path: Path) -> LoadedWeights:
    config, tensors, notes, arguments = read_pt_file(path)
    # annotated-mpnet saves the tokenizer beside its first checkpoint, and its name in each.
    # The directory first: a name may mean something else today, or need a connection.
    tokenizer = _tokenizer_in(path.parent / "tokenizer")
    name = arguments.get("tokenizer_name")
    if tokenizer is None and isinstance(name, str):
        tokenizer = name
    return LoadedWeights(config, tensors, notes, tokenizer)


def _tokenizer_in(directory: Path) -> str | None:
    """Return a directory if it holds a tokenizer: by what `from_pretrained` looks for."""
    return str(directory) if any((directory / name).exists() for name in TOKENIZER_FILES) else None
