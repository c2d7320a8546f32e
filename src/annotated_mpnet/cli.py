"""The console commands: parse, call, exit code.

    0          done
    1          a bug, with its traceback, or a lost process of a distributed run
    2 to 7     a user error, one line on standard error (`errors.py`)
    130, 143   stopped by SIGINT or SIGTERM after saving (`signals.py`)
    141        the reader of standard output went away (`| head`)

With `--debug`, a log and the traceback of a user error go to standard error.

torchrun starts the same command once per GPU, and a wrong flag is wrong in all of them. Rank 0
prints the error; the others exit silently with the same code, and a few seconds later, because
torchrun ends all processes as soon as one has failed.

torch takes seconds to import, so `--help` and errors in flags must not need it: the commands import
what they call inside their functions.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from annotated_mpnet.errors import ConfigError, FailedElsewhereError, UserError
from annotated_mpnet.settings.commands import ConvertCommand, PretrainCommand, TokenizerCommand
from annotated_mpnet.settings.config_file import preset_list, to_toml
from annotated_mpnet.settings.parsing import parse, parse_pretrain
from annotated_mpnet.signals import Stopped, listening

log = logging.getLogger("annotated_mpnet")

SILENT_RANKS_WAIT = 3
"""Seconds that a process waits before it exits silently."""


def pretrain() -> None:
    """Run `pretrain-mpnet` and exit."""
    sys.exit(_ending("pretrain-mpnet", _pretrain, sys.argv[1:]))


def convert() -> None:
    """Run `convert-to-hf` and exit."""
    sys.exit(_ending("convert-to-hf", _convert, sys.argv[1:]))


def train_tokenizer() -> None:
    """Run `train-mpnet-tokenizer` and exit."""
    sys.exit(_ending("train-mpnet-tokenizer", _train_tokenizer, sys.argv[1:]))


def _pretrain(arguments: Sequence[str]) -> None:
    # Validated before --print-config too: what it prints can be run.
    command = _checked(arguments)
    if command.settings.run.debug:
        # It may come from a file; `_ending` only sees the command line.
        _log_everything()
    if command.preset == "list":
        print(preset_list(min(shutil.get_terminal_size().columns, 100)), end="")
    elif command.print_config:
        print(to_toml(command.settings, commented=True), end="")
    elif command.preset == "demo":
        from annotated_mpnet.demo.show import run_demo

        run_demo(command.settings, dry_run=command.dry_run)
    else:
        from annotated_mpnet.runs.run import run_pretraining

        run_pretraining(command.settings, dry_run=command.dry_run)


def _checked(arguments: Sequence[str]) -> PretrainCommand:
    """Parse and validate; all ranks but the first fail silently."""
    try:
        command = parse_pretrain(arguments)
        command.settings.validate()
        processes = os.environ.get("WORLD_SIZE", "1")
        if command.preset == "demo" and processes != "1":
            raise ConfigError(
                f"--preset demo is for one process, and torchrun has started {processes}; use "
                "another preset with --train-dir and --tokenizer-name"
            )
    except ConfigError as error:
        if _is_first_rank():
            raise
        raise FailedElsewhereError(str(error), error.exit_code) from None
    return command


def _is_first_rank() -> bool:
    # torchrun sets RANK.
    return os.environ.get("RANK", "0") == "0"


def _convert(arguments: Sequence[str]) -> None:
    command = parse(ConvertCommand, arguments, "convert-to-hf")
    from annotated_mpnet.conversion import convert_checkpoint

    convert_checkpoint(
        command.mpnet_checkpoint_path,
        command.hf_model_folder_path,
        save_tokenizer=command.save_tokenizer,
        overwrite=command.overwrite,
        pytorch_bin=command.pytorch_bin,
    )


def _train_tokenizer(arguments: Sequence[str]) -> None:
    command = parse(TokenizerCommand, arguments, "train-mpnet-tokenizer")
    from annotated_mpnet.text.learn_tokenizer import train_tokenizer_files

    report = train_tokenizer_files(
        command.files,
        command.vocab_size,
        command.output,
        overwrite=command.overwrite,
        text_field=command.text_field,
    )
    print(report)


def _ending(
    program: str, command: Callable[[Sequence[str]], None], arguments: Sequence[str]
) -> int:
    """Run a command and return its exit code. A bug passes through, with its traceback.

    >>> from contextlib import redirect_stderr
    >>> with redirect_stderr(sys.stdout):
    ...     _ending("pretrain-mpnet", _pretrain, ["--lr", "-1"])
    pretrain-mpnet: error: --lr is -1.0; expected a number > 0 and <= 1
    2
    """
    if "--debug" in arguments:
        _log_everything()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with listening():
            command(arguments)
            # Flushed here, to notice a closed pipe within this block.
            sys.stdout.flush()
    except FailedElsewhereError as failure:
        time.sleep(SILENT_RANKS_WAIT)
        return failure.exit_code
    except UserError as error:
        log.debug("traceback of the error:", exc_info=True)
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        if _is_first_rank():
            print(f"{program}: stopped by {stopped}", file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:
        # Python flushes again at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _log_everything() -> None:
    """Let us and the libraries that read text and weights log to standard error."""
    # The libraries read these once, when they are imported, which is later.
    for library in ("DATASETS", "HF_HUB", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "debug")
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s{rank} %(name)s: %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.DEBUG)
