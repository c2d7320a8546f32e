"""The console commands: parse, then call.

Nothing is decided here. The flags of `pretrain-mpnet` are the fields of `config.PretrainingConfig`;
tyro makes parser and help of them, docstrings included. What this module adds is

- layers: a preset and a configuration file stand for arguments, which come before those that were
  typed (`config_file.py`);
- other spellings: flags of annotated-mpnet, such as `-prenorm`, are rewritten before parsing;
- endings: a mistake of the user's becomes one line and an exit code (`errors.py`), a signal 130 or
  143, and a bug keeps its traceback.

PyTorch is imported only once the arguments are known to be good: `--help` and a misspelt flag
answer at once.
"""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from annotated_mpnet.config import PretrainingConfig, aliases
from annotated_mpnet.config_file import Preset, read_config_file, read_preset, to_toml
from annotated_mpnet.errors import ConfigError, UserError

Command = TypeVar("Command")


@dataclass(frozen=True, kw_only=True)
class PretrainCommand:
    """Pretrain MPNet on your own text, from scratch to a verified Hugging Face model.

    To see it work: pretrain-mpnet --preset demo

    On your text: pretrain-mpnet --train-dir DIR --valid-file FILE --tokenizer-name DIR

    After an interruption: the same command once more, with --resume
    """

    preset: Preset | None = None
    """Start from the settings of a preset. demo: a small model on the novels that come with the
    package, in minutes on a CPU."""
    config: Path | None = None
    """Take settings from a TOML file, such as the config.toml of a former run. The command line
    overrides the file, and the file the preset."""
    print_config: bool = False
    """Print all settings as TOML, and do nothing."""
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
    """Write the tokenizer's files too."""
    overwrite: bool = False
    """Replace the directory if it exists."""
    pytorch_bin: bool = False
    """Write pytorch_model.bin in addition, for old readers."""
    debug: bool = False
    """Show tracebacks of mistakes too."""


@dataclass(frozen=True, kw_only=True)
class TokenizerCommand:
    """Learn a WordPiece tokenizer from text files, laid out as MPNet's.

    The special tokens are <s> 0, <pad> 1, </s> 2, <unk> 3, and <mask> at the end; text is read in
    lower case and without accents, as BERT's is.
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text: files or directories, in the formats of --train-dir."""
    vocab_size: int = 30527
    """Tokens, the special ones included. MPNet has 30527; small text wants fewer."""
    output: Path
    """The directory to write; then give it as --tokenizer-name."""
    overwrite: bool = False
    """Replace the directory if it exists."""
    debug: bool = False
    """Show tracebacks of mistakes too."""


def pretrain() -> None:
    """Run `pretrain-mpnet` and exit."""
    sys.exit(_ending("pretrain-mpnet", _pretrain, sys.argv[1:]))


def convert() -> None:
    """Run `convert-to-hf` and exit."""
    sys.exit(_ending("convert-to-hf", _convert, sys.argv[1:]))


def train_tokenizer() -> None:
    """Run `train-mpnet-tokenizer` and exit."""
    sys.exit(_ending("train-mpnet-tokenizer", _train_tokenizer, sys.argv[1:]))


def parse_pretrain(arguments: Sequence[str]) -> PretrainCommand:
    """Parse the arguments of `pretrain-mpnet`, under the layers that they ask for.

    Raises:
        ConfigError: in one line, what is wrong with the first wrong argument.
    """
    typed = _rewrite_aliases(arguments)
    layers = _parse(PretrainCommand, typed, "pretrain-mpnet")
    below = read_preset(layers.preset) if layers.preset else []
    if layers.config is not None:
        below += read_config_file(layers.config)
    return _parse(PretrainCommand, [*below, *typed], "pretrain-mpnet")


def _pretrain(arguments: Sequence[str]) -> None:
    command = parse_pretrain(arguments)
    command.settings.validate()
    if command.print_config:
        print(to_toml(command.settings), end="")
        return
    if command.preset == "demo":
        from annotated_mpnet.demo.show import run_demo

        run_demo(command.settings)
    else:
        from annotated_mpnet.run import run_pretraining

        run_pretraining(command.settings)


def _convert(arguments: Sequence[str]) -> None:
    command = _parse(ConvertCommand, arguments, "convert-to-hf")
    from annotated_mpnet.conversion import convert_checkpoint

    convert_checkpoint(
        command.mpnet_checkpoint_path,
        command.hf_model_folder_path,
        save_tokenizer=command.save_tokenizer,
        overwrite=command.overwrite,
        pytorch_bin=command.pytorch_bin,
    )


def _train_tokenizer(arguments: Sequence[str]) -> None:
    command = _parse(TokenizerCommand, arguments, "train-mpnet-tokenizer")
    from annotated_mpnet.data.sources import find_text_files
    from annotated_mpnet.data.tokenizer_training import train_tokenizer_files

    files = [file for path in command.files for file in find_text_files(path, "FILES")]
    tokenizer = train_tokenizer_files(
        files, command.vocab_size, command.output, overwrite=command.overwrite
    )
    print(f"{command.output}: {len(tokenizer):,} tokens; use it by --tokenizer-name")


def _ending(
    program: str, command: Callable[[Sequence[str]], None], arguments: Sequence[str]
) -> int:
    """Run a command and translate how it ends into an exit code."""
    from annotated_mpnet.signals import Stopped, listening

    if not sys.stderr.isatty():
        # A bar that redraws itself is a page of noise in a file.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with listening():
            command(arguments)
            sys.stdout.flush()
    except UserError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(f"{program}: stopped by {stopped}", file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). Python would complain once more when it
        # flushes at exit, so that what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parse(kind: type[Command], arguments: Sequence[str], program: str) -> Command:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind, prog=program, args=list(arguments), config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as ending:
        if ending.code in (0, None):
            raise
        raise ConfigError(f"{_in_one_line(said.getvalue())}; see {program} --help") from None


def _in_one_line(box: str) -> str:
    """Take the message out of the box that tyro draws around it.

    >>> _in_one_line("╭─ Value error ─╮\\n│ --lr: not a │\\n│ number: 'x' │\\n│ ────── │\\n│ ... │")
    "--lr: not a number: 'x'"
    """
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    parts = " ".join(lines).split("──")
    message = parts[0].strip()
    meant = re.search(r"Perhaps you meant:\s+(--?[\w-]+)", " ".join(lines))
    return f"{message} (perhaps you meant {meant[1]})" if meant else message


def _rewrite_aliases(arguments: Sequence[str]) -> list[str]:
    """Replace other spellings by the flag itself.

    >>> _rewrite_aliases(["-prenorm", "--save_steps=500", "-wd", "0"])
    ['--normalize-before', '--checkpoint-interval=500', '--weight-decay', '0']
    """
    flags = dict(aliases())
    rewritten = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        rewritten.append(flags.get(name, name) + equals + value)
    return rewritten
