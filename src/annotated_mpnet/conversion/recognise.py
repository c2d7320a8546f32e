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

import os
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from annotated_mpnet.checkpoints.checkpoint import (
    BEST,
    CONFIG,
    MODEL,
    STATE,
    TOKENIZER,
    load_checkpoint,
)
from annotated_mpnet.checkpoints.manifest import MANIFEST
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.conversion.export import ExportReport, export_to_hugging_face
from annotated_mpnet.conversion.foreign import (
    LoadedWeights,
    checked,
    expected_tensors,
    tokenizer_in,
)
from annotated_mpnet.conversion.hub_upload import check_upload, upload
from annotated_mpnet.conversion.hugging_face import HUB_NAME, download, read_hugging_face
from annotated_mpnet.conversion.kept import base_facts, from_export_files
from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.conversion.pt_files import read_pt_file
from annotated_mpnet.errors import CheckpointError, ConfigError, UserError
from annotated_mpnet.files.output import HUGGING_FACE_MODEL, refuse_to_replace, write_errors
from annotated_mpnet.files.records import reading
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.text.tokenizer import load_tokenizer

# Either is enough: a checkpoint that lost one of the two is damaged, not foreign.
OURS = (STATE, MANIFEST)
HUGGING_FACE = ("config.json", "modules.json", "0_Transformer")


def load_any(path_or_name: str) -> LoadedWeights:
    """Read a network from a path, or a name on the Hub, of any of the kinds above.

    Raises:
        CheckpointError: none of these, damaged, or not a network that ours can be.
    """
    path = Path(path_or_name)
    with reading(path_or_name):
        # A command written for annotated-mpnet names a file; here the same name is a directory.
        if path.suffix == ".pt" and not path.exists() and path.with_suffix("").is_dir():
            path = path.with_suffix("")
        if path.is_dir():
            return _read_directory(path)
        if path.is_file():
            return read_pt_file(path)
        if os.path.lexists(path):
            raise CheckpointError(f"{path_or_name!r} is neither a file nor a directory")
        if path.suffix != ".pt" and HUB_NAME.fullmatch(path_or_name) is not None:
            return read_hugging_face(download(path_or_name))
    raise CheckpointError(
        f"{path_or_name!r} does not exist; expected a checkpoint, a run's directory, a Hugging "
        "Face model (directory or Hub name), or a .pt file of fairseq or annotated-mpnet"
    )


def convert_checkpoint(
    path: Path,
    directory: Path,
    *,
    save_tokenizer: bool,
    overwrite: bool,
    pytorch_bin: bool,
    push_to_hub: str | None = None,
    private: bool = False,
) -> ExportReport:
    """Read a network of any kind and export it: the command `convert-to-hf`.

    Prints notes and what was proved after the export, so a failure is not buried under them.

    Args:
        path: a path, or a name on the Hub.
        directory: the target; absent or empty, unless `overwrite`.
        save_tokenizer: write the tokenizer too; False also allows weights that come without one.
        overwrite: replace an older Hugging Face model there.
        pytorch_bin: also write `pytorch_model.bin`.
        push_to_hub: also upload it, to the repository of this name.
        private: make that repository private, if there is none yet.

    Raises:
        CheckpointError, ConfigError, WriteError: see `load_any`, `export_to_hugging_face` and
            `upload`.
    """
    if private and push_to_hub is None:
        raise ConfigError("--private is about the repository of --push-to-hub; give its name too")
    if push_to_hub is not None:
        check_upload(push_to_hub)
    with write_errors(directory):  # before the weights are read
        inputs = [path] if os.path.lexists(path) else []
        refuse_to_replace(directory, HUGGING_FACE_MODEL, overwrite=overwrite, inputs=inputs)
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
        modules=loaded.modules,
        facts=loaded.facts or base_facts(str(path)),
        fresh_head=loaded.fresh_head,
        on_hub=push_to_hub,
    )
    for note in loaded.notes:
        print(note)
    if report.vocabulary_cut:
        print(f"left out {report.vocabulary_cut} embeddings that stand for no token")
    print(f"wrote {report.directory}: {', '.join(file.name for file in report.files)}")
    print(f"opened it again: logits differ by {report.max_difference:.1e} at most")
    if push_to_hub is not None:
        print(f"uploaded: {upload(directory, push_to_hub, private)}")
    return report


def _tokenizer_of(loaded: LoadedWeights, needed: bool) -> PreTrainedTokenizerFast | None:
    """Return a network's tokenizer; None if it is unknown and not needed.

    It is read even if it is not written: it tells how many rows of the vocabulary are tokens.
    """
    try:
        if loaded.tokenizer is None:
            raise ConfigError("the tokenizer of these weights is unknown")
        with reading("the tokenizer"), quiet_transformers():
            return load_tokenizer(loaded.tokenizer)
    except UserError as error:
        if needed:
            raise ConfigError(f"{error}; or export without one: --no-save-tokenizer") from error
        return None


def _read_directory(path: Path) -> LoadedWeights:
    is_checkpoint = any((path / name).exists() for name in OURS)
    # The best one first, then the rest by number: checkpoint10 after checkpoint9.
    for checkpoint in [path] if is_checkpoint else [path / BEST, *newest_first(path)]:
        if checkpoint.is_dir():
            return _read_checkpoint(checkpoint)
    if any((path / name).exists() for name in HUGGING_FACE):
        return read_hugging_face(path)
    raise CheckpointError(
        f"{path} holds no model: neither a checkpoint (manifest.json), nor a run "
        "(best_checkpoint), nor a Hugging Face model (config.json); for a .pt file, give the file"
    )


def _read_checkpoint(directory: Path) -> LoadedWeights:
    checkpoint = load_checkpoint(directory, to_resume=False)
    config = checkpoint.model_config
    # A right manifest says that no file has changed, not that they were made for each other.
    with reading(directory / CONFIG):
        expected = expected_tensors(config)
    tensors = checked(checkpoint.model_tensors, expected, directory / MODEL)
    modules, facts = from_export_files(checkpoint)
    return LoadedWeights(config, tensors, [], tokenizer_in(directory / TOKENIZER), modules, facts)
