"""The console commands: parse, then call, then say how it ended.

    arguments  --parsing.py-->  command  --validate-->  run_pretraining(settings)  -->  exit code

Nothing about training is decided here. What this module is responsible for is the edge between the
program and the shell that started it.

**How a command ends.** Whoever starts a run for a week starts it from a script, and a script reads
one number. So each kind of ending has its own, and each mistake one line on standard error:

    0          done; also what was asked to be shown was shown
    1          a bug of ours, with its traceback, or a process of several that was lost
    2 to 7     a mistake that the user can mend (`errors.py`): flags, text, checkpoint, numbers,
               disk, memory
    130, 143   stopped by SIGINT or SIGTERM, after saving (`signals.py`)
    141        whoever read the output has enough (`| head`)

A traceback shows where in the program something happened. To somebody who misspelt a path that says
nothing, and it buries the one line that would; `--debug` shows it nevertheless. It is a log level,
and the traceback of a mistake is one of the things that are logged at it:

    nothing       what the run is and how it goes           standard output, log.txt
    --debug       and what it does for that, and when:      standard error
                  ours, and the libraries' that read text and weights

**One process of several speaks.** `torchrun` starts the same command once for each GPU, and each of
them parses it. A wrong flag is wrong in all of them, and is said by the first; the others end with
its exit code and without a word. They also wait a little: torchrun ends all processes as soon as
one of them has failed, and should that be a silent one, nobody would ever say what was wrong.

A bug is not caught at all. It has to reach whoever can mend it, with its traceback, and nothing
kind in between:

>>> _ending("pretrain-mpnet", lambda arguments: 1 / 0, [])
Traceback (most recent call last):
ZeroDivisionError: division by zero

**`--help` answers at once.** PyTorch takes seconds to import. It is imported only once the
arguments are known to be good, which is why some imports stand inside of functions here.

`pyproject.toml` makes commands of `pretrain`, `convert` and `train_tokenizer` below. The first of
them is `python -m annotated_mpnet` too, for torchrun, which starts modules.

Next: `runs/run.py`, the run itself.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from annotated_mpnet.errors import ConfigError, FailedElsewhereError, UserError
from annotated_mpnet.settings.commands import ConvertCommand, PretrainCommand, TokenizerCommand
from annotated_mpnet.settings.config_file import to_toml
from annotated_mpnet.settings.parsing import parse, parse_pretrain
from annotated_mpnet.settings.preset_files import preset_list

log = logging.getLogger("annotated_mpnet")

LET_OTHERS_SPEAK = 3
"""Seconds that a process waits before it ends without a word."""


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
    """Do the one thing that a command line of `pretrain-mpnet` asks for.

    >>> _pretrain(["--preset", "tiny", "--lr", "0.001", "--print-config"])  # doctest: +ELLIPSIS
    # All settings of pretrain-mpnet. To run with them: pretrain-mpnet --config FILE
    ...

    Raises:
        UserError: one of its kinds, from here or from the run.
        Stopped: a signal asked for it.
    """
    # Checked before it is printed too: what `--print-config` writes can be run.
    command = _checked(arguments)
    if command.settings.run.debug:
        # Perhaps by a file, which nobody had read when the command began (`_ending`).
        _log_everything()
    if command.preset == "list":
        # As wide as is pleasant to read, on a wide terminal too.
        print(preset_list(min(shutil.get_terminal_size().columns, 100)), end="")
    elif command.print_config:
        print(to_toml(command.settings, commented=True), end="")
    elif command.preset == "demo":
        # The one preset that brings its own text, and shows more than numbers at the end.
        from annotated_mpnet.demo.show import run_demo

        run_demo(command.settings, dry_run=command.dry_run)
    else:
        from annotated_mpnet.runs.run import run_pretraining

        run_pretraining(command.settings, dry_run=command.dry_run)


def _checked(arguments: Sequence[str]) -> PretrainCommand:
    """Parse and validate; a mistake is said by the first process only.

    Raises:
        ConfigError: what is wrong with the arguments.
        FailedElsewhereError: the same, in every process of `torchrun` but the first.
    """
    try:
        command = parse_pretrain(arguments)
        command.settings.validate()
        if command.preset == "demo" and os.environ.get("WORLD_SIZE", "1") != "1":
            # All of them would write the same novels.
            raise ConfigError(
                f"--preset demo is for one process, and torchrun has started "
                f"{os.environ['WORLD_SIZE']}; give another preset, --train-dir and --tokenizer-name"
            )
    except ConfigError as error:
        if _speaks():
            raise
        raise FailedElsewhereError(str(error), error.exit_code) from None
    return command


def _speaks() -> bool:
    # torchrun numbers its processes by RANK. Without torchrun there is only one. The environment is
    # read here, once for the time before a run: the run asks PyTorch (`training/distributed.py`).
    return os.environ.get("RANK", "0") == "0"


def _convert(arguments: Sequence[str]) -> None:
    """Do what `convert-to-hf` is asked for.

    Raises:
        UserError: the checkpoint cannot be read, or Hugging Face cannot represent it.
    """
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
    """Do what `train-mpnet-tokenizer` is asked for.

    Raises:
        UserError: there is no text, or no place for the tokenizer.
    """
    command = parse(TokenizerCommand, arguments, "train-mpnet-tokenizer")
    # For a parser, several files may be none. What would come of it is a vocabulary of five special
    # tokens, and a surprise much later.
    if not command.files:
        raise ConfigError("no FILES are given; expected files or directories of text to learn from")
    from annotated_mpnet.text.learn_tokenizer import train_tokenizer_files
    from annotated_mpnet.text.sources import find_text_files

    files = [file for path in command.files for file in find_text_files(path, "FILES")]
    tokenizer = train_tokenizer_files(
        files, command.vocab_size, command.output, overwrite=command.overwrite
    )
    print(f"{command.output}: {len(tokenizer):,} tokens; use it by --tokenizer-name")


def _ending(
    program: str, command: Callable[[Sequence[str]], None], arguments: Sequence[str]
) -> int:
    """Run a command and translate how it ends into an exit code.

    What is no mistake of the user's passes through, to become a traceback and 1.

    >>> from contextlib import redirect_stderr
    >>> with redirect_stderr(sys.stdout):
    ...     _ending("pretrain-mpnet", _pretrain, ["--lr", "-1"])
    pretrain-mpnet: error: --lr is -1.0; expected a number > 0 and <= 1
    2
    """
    from annotated_mpnet.signals import Stopped, listening

    if "--debug" in arguments:
        _log_everything()
    if not sys.stderr.isatty():
        # A bar that redraws itself is a page of noise in a file.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with listening():
            command(arguments)
            # Here rather than at exit, so that a reader who has gone is noticed within this block.
            sys.stdout.flush()
    except FailedElsewhereError as failure:
        # It is said where it happened. Eight processes would bury it under seven repetitions.
        time.sleep(LET_OTHERS_SPEAK)
        return failure.exit_code
    except UserError as error:
        log.debug("the mistake, from the inside:", exc_info=True)
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        if _speaks():
            print(f"{program}: stopped by {stopped}", file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at
        # exit, so that what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _log_everything() -> None:
    """Let us, and the libraries that read text and weights, say on standard error what they do."""
    # They look at these once, when they are imported: later than here.
    for library in ("DATASETS", "HF_HUB", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "debug")
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    # Beside theirs: each of them brings a handler of its own for what it says.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s{rank} %(name)s: %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.DEBUG)
