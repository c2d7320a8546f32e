"""What each command can be told: a field is a flag, its docstring the help.

    pretrain-mpnet          PretrainCommand      text            -> model
    convert-to-hf           ConvertCommand       checkpoint      -> Hugging Face model
    train-mpnet-tokenizer   TokenizerCommand     text            -> tokenizer

The settings of a run are in `settings/config.py`: they are saved in the run's `config.toml` and
hold again when the run is resumed. The fields here, such as `--dry-run`, are not saved.

The docstring of a class is the first thing that `--help` shows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.config_file import Preset


@dataclass(frozen=True, kw_only=True)
class PretrainCommand:
    """Pretrain MPNet on your own text, from scratch to a verified Hugging Face model.

        To see it work:         pretrain-mpnet --preset demo
        On your text:           pretrain-mpnet --train-dir DIR --tokenizer-name DIR
        What it would do:       the same command, with --dry-run
        After an interruption:  the same command, with --resume

    Flags may be written with dashes or underscores. Every user error is one line and an exit code.
    """

    preset: Literal[Preset, "list"] | None = None
    """Start from the settings of a preset, from a two-minute demo to MPNet-base. A shorter
    --total-updates shortens its warm-up in proportion, unless --warmup-updates is given. list: show
    all presets with their cost and expected loss, and exit."""
    config: Path | None = None
    """Take settings from a file, TOML or YAML (.yaml or .yml), such as the config.toml of an
    earlier run. The command line overrides the file, and the file overrides the preset."""
    print_config: bool = False
    """Print all settings with their explanations, as TOML for --config, and exit."""
    dry_run: bool = False
    """Build everything, run one batch, print the plan (device, parameters, tokens per update,
    memory, time), and exit without starting a run. Worth a minute before a run of hours."""
    settings: PretrainingConfig = field(default_factory=PretrainingConfig)
    # What parsing has changed, for the plan. Not a flag: it has no docstring.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Turn a checkpoint into a Hugging Face MPNetForMaskedLM, and check that it is the same model.

    The result is loaded again and its logits are compared with the checkpoint's. If they differ by
    more than 1e-4, the command fails and writes nothing. A sentence encoder keeps its modules, so
    sentence-transformers computes the same vectors.
    """

    mpnet_checkpoint_path: Path
    """A checkpoint, a run's directory (its best model is converted), a model of Hugging Face or of
    sentence-transformers (directory or Hub name), or a .pt file of annotated-mpnet or of
    Microsoft's code."""
    hf_model_folder_path: Path
    """The directory to write."""
    save_tokenizer: bool = True
    """Also write the tokenizer's files, to make the directory complete."""
    overwrite: bool = False
    """Replace the directory if it holds a Hugging Face model and nothing else. Otherwise, a
    directory that is not empty is an error."""
    pytorch_bin: bool = False
    """Also write pytorch_model.bin, for old readers."""
    push_to_hub: str | None = None
    """Also upload the result to this repository of the Hugging Face Hub, OWNER/NAME; it is made if
    there is none. It takes a token that may write: `hf auth login`, or HF_TOKEN. An older export
    there is replaced, with its README.md; the repository's history keeps it."""
    private: bool = False
    """Make the repository of --push-to-hub private, if it is made now. Default: public."""
    debug: bool = False
    """Write a debug log to standard error, including the libraries' messages and the traceback of
    an error."""


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand:
    """Learn a WordPiece tokenizer from text files, with MPNet's special tokens.

    They are `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and `<mask>` at the end. Text is lower-cased
    and stripped of accents, as BERT does; the vowel signs of Indic scripts and Thai are kept.
    """

    files: list[Path]
    """Text: files or directories, in the formats of --train-dir."""
    vocab_size: int = 30527
    """Number of tokens, 64 to 10000000, special tokens included. MPNet has 30527; use fewer for a
    small text."""
    text_field: str = "text"
    """Column that holds the text in .jsonl, .parquet and .csv files."""
    output: Path
    """The directory to write. Pass it to pretrain-mpnet as --tokenizer-name."""
    overwrite: bool = False
    """Replace the directory if it holds a tokenizer and nothing else. Otherwise, a directory that
    is not empty is an error."""
    debug: bool = False
    """Write a debug log to standard error, including the libraries' messages and the traceback of
    an error."""
