"""What each command can be told, as dataclasses: a field is a flag, its docstring the help.

The settings of a run, which are most of what `pretrain-mpnet` can be told, are `settings/config.py`'s. Here
is the rest: where settings come from, and the two commands that need only a few.

    pretrain-mpnet          PretrainCommand      text            -> model
    convert-to-hf           ConvertCommand       checkpoint      -> Hugging Face model
    train-mpnet-tokenizer   TokenizerCommand     text            -> tokenizer

The difference between a setting and what stands here: a setting is kept, in the run's
`config.toml`, and holds again when the run is resumed. `--dry-run` does not, and is not.

A class's docstring is the first thing that `--help` shows, and so begins with what the command is
for, and goes on with commands to copy.

Next: `settings/parsing.py`, which makes these from a command line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.preset_files import Preset


@dataclass(frozen=True, kw_only=True)
class PretrainCommand:
    """Pretrain MPNet on your own text, from scratch to a verified Hugging Face model.

        To see it work:         pretrain-mpnet --preset demo
        On your text:           pretrain-mpnet --train-dir DIR --tokenizer-name DIR
        What it would do:       the same command, with --dry-run
        After an interruption:  the same command, with --resume

    A flag may be written with dashes or underscores. A mistake is one line and an exit code.
    """

    preset: Literal[Preset, "list"] | None = None
    """Start from the settings of a preset, from a demo of two minutes to MPNet-base. list: show
    them all, with cost and expected loss, and do nothing."""
    config: Path | None = None
    """Take settings from a file, TOML or (if it ends in .yaml or .yml) YAML, such as the
    config.toml of a former run. The command line overrides the file, and the file the preset."""
    print_config: bool = False
    """Print the settings that would hold, each with its explanation, as TOML for --config; and do
    nothing."""
    dry_run: bool = False
    """Build everything, run one batch, print the plan (device, parameters, tokens of an update,
    memory, time), and leave no run behind. What takes hours is worth a minute of this."""
    settings: Annotated[PretrainingConfig, tyro.conf.arg(name="")] = field(
        default_factory=PretrainingConfig
    )


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Turn a checkpoint into a Hugging Face MPNetForMaskedLM, and prove that it is the same model.

    What was written is loaded again and its logits compared; if they differ by more than 1e-4, it
    is a failure and nothing is left behind.
    """

    mpnet_checkpoint_path: Path
    """A checkpoint or a run's directory (then its best model), or a .pt file of annotated-mpnet or
    of Microsoft's code."""
    hf_model_folder_path: Path
    """The directory to write."""
    save_tokenizer: bool = True
    """Write the tokenizer's files too, so that the directory is enough by itself."""
    overwrite: bool = False
    """Replace the directory if it exists. Without, it is refused."""
    pytorch_bin: bool = False
    """Write pytorch_model.bin in addition, for old readers."""
    debug: bool = False
    """Log on standard error what is done when, by the libraries too, with the traceback of a
    mistake."""


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand:
    """Learn a WordPiece tokenizer from text files, laid out as MPNet's.

    The special tokens are `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, and `<mask>` at the end; text is
    read in lower case and without accents, as BERT's is.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text: files or directories, in the formats of --train-dir."""
    vocab_size: int = 30527
    """Tokens, the special ones included. MPNet has 30527; small text wants fewer."""
    output: Path
    """The directory to write; then give it as --tokenizer-name."""
    overwrite: bool = False
    """Replace the directory if it exists. Without, it is refused."""
    debug: bool = False
    """Log on standard error what is done when, by the libraries too, with the traceback of a
    mistake."""
