"""The console commands: parse, call, exit code.

    0          done
    1          a bug, with its traceback, or a lost process of a distributed run
    2 to 7     a user error, one line on standard error (`errors.py`)
    130, 143   stopped by SIGINT or SIGTERM after saving (`signals.py`)
    141        the reader of standard output went away (`| head`)

With `--debug`, a log and the traceback of a user error go to standard error.

torchrun starts the same command once per GPU, and a wrong flag is mostly wrong in all of them. Rank
0 prints the error at once, and torchrun ends the others. A rank that is still there some seconds
later is the only one with this mistake, and prints it.

A message that cannot be printed ends no run and changes no exit code: standard output may be
closed, full, or unable to write a name in its encoding. `--print-config`, `--preset list` and
`--help` are the exception, because there the output is all that was asked for.

torch takes seconds to import, so `--help` and errors in flags must not need it: the commands import
what they call inside their functions.
"""

import errno
import io
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from typing import IO

from annotated_mpnet.errors import (
    ConfigError,
    FailedElsewhereError,
    UserError,
    WriteError,
    printable,
    without_password,
)
from annotated_mpnet.settings.commands import (
    ConvertCommand,
    ExplainCommand,
    PretrainCommand,
    TokenizerCommand,
)
from annotated_mpnet.settings.config_file import preset_list, to_toml
from annotated_mpnet.settings.parsing import parse, parse_pretrain
from annotated_mpnet.signals import Stopped, listening

log = logging.getLogger("annotated_mpnet")

SILENT_RANKS_WAIT = 3
"""Seconds in which torchrun ends the other processes after rank 0."""

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EBUSY", "ESTALE"),
        *("ENOENT", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP", "ENXIO", "ENODEV"),
        *("EMFILE", "ENFILE", "ENOMEM"),
    )
)
"""Errors of the operating system that come from the state of the machine, and not from a bug."""


def pretrain() -> None:
    """Run `pretrain-mpnet` and exit."""
    sys.exit(_ending("pretrain-mpnet", _pretrain, sys.argv[1:]))


def convert() -> None:
    """Run `convert-to-hf` and exit."""
    sys.exit(_ending("convert-to-hf", _convert, sys.argv[1:]))


def train_tokenizer() -> None:
    """Run `train-mpnet-tokenizer` and exit."""
    sys.exit(_ending("train-mpnet-tokenizer", _train_tokenizer, sys.argv[1:]))


def explain() -> None:
    """Run `explain-mpnet` and exit."""
    sys.exit(_ending("explain-mpnet", _explain, sys.argv[1:]))


def _pretrain(arguments: Sequence[str]) -> None:
    # Before torch is imported. OpenMP's threads spin while they wait for each other, so two runs on
    # two cores take each other's time (`docs/log.md`).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Validated before --print-config too: what it prints can be run.
    command = _checked(arguments)
    if command.preset == "list":
        _print_product(preset_list(min(shutil.get_terminal_size().columns, 100)))
    elif command.print_config:
        _print_product(to_toml(command.settings, commented=True))
    elif command.preset == "demo":
        from annotated_mpnet.demo.show import run_demo

        with redirect_stdout(_Spoken()):
            run_demo(command.settings, dry_run=command.dry_run, notes=command.notes)
    else:
        from annotated_mpnet.runs.run import run_pretraining

        with redirect_stdout(_Spoken()):
            run_pretraining(command.settings, dry_run=command.dry_run, notes=command.notes)


def _checked(arguments: Sequence[str]) -> PretrainCommand:
    """Parse and validate. All ranks but the first leave it to the first to say what is wrong."""
    try:
        check_torchrun(os.environ)
        command = parse_pretrain(arguments)
        command.settings.validate()
        processes = os.environ.get("WORLD_SIZE", "1")
        if command.preset == "demo" and processes != "1":
            raise ConfigError(
                f"--preset demo is for one process, and torchrun has started {processes}; use "
                "another preset with --train-dir and --tokenizer-name"
            )
    except ConfigError:
        if not _is_first_rank():
            time.sleep(SILENT_RANKS_WAIT)
        raise
    return command


def check_torchrun(environment: Mapping[str, str]) -> None:
    """Refuse the variables by which torchrun tells a process its rank, if they make no sense.

    >>> check_torchrun({})
    >>> check_torchrun({"RANK": "1", "WORLD_SIZE": "2"})
    Traceback (most recent call last):
    annotated_mpnet.errors.ConfigError: RANK is '1', but LOCAL_RANK is not set; ...
    """
    given = {name: environment[name] for name in TORCHRUN if name in environment}
    if given.get("WORLD_SIZE", "1") == "1" and given.get("RANK", "0") == "0":
        return  # one process, which does not look at the others
    advice = "start the processes with torchrun, or unset RANK and WORLD_SIZE for a single one"
    first = next(f"{name} is {value!r:.80}" for name, value in given.items())
    for name in TORCHRUN:
        if not given.get(name):
            raise ConfigError(f"{first}, but {name} is not set; {advice}")
    numbers = {}
    for name in TORCHRUN:
        if name == "MASTER_ADDR":
            continue
        if not re.fullmatch("[0-9]{1,9}", given[name], re.ASCII):
            raise ConfigError(f"{name} is {given[name]!r:.80}; expected a whole number; {advice}")
        numbers[name] = int(given[name])
    for name, most in (
        ("RANK", numbers["WORLD_SIZE"] - 1),
        ("LOCAL_RANK", numbers["RANK"]),
        ("MASTER_PORT", 65535),
    ):
        if numbers[name] > most:
            raise ConfigError(f"{name} is {numbers[name]}; expected at most {most}; {advice}")


def _is_first_rank() -> bool:
    # torchrun sets RANK.
    return os.environ.get("RANK", "0") == "0"


def _convert(arguments: Sequence[str]) -> None:
    command = parse(ConvertCommand, arguments, "convert-to-hf")
    from annotated_mpnet.conversion import convert_checkpoint

    with redirect_stdout(_Spoken()):
        convert_checkpoint(
            command.mpnet_checkpoint_path,
            command.hf_model_folder_path,
            save_tokenizer=command.save_tokenizer,
            overwrite=command.overwrite,
            pytorch_bin=command.pytorch_bin,
            push_to_hub=command.push_to_hub,
            private=command.private,
        )


def _train_tokenizer(arguments: Sequence[str]) -> None:
    command = parse(TokenizerCommand, arguments, "train-mpnet-tokenizer")
    from annotated_mpnet.runs.tokenizer import learn_tokenizer

    with redirect_stdout(_Spoken()):
        learn_tokenizer(command)


def _explain(arguments: Sequence[str]) -> None:
    command = parse(ExplainCommand, arguments, "explain-mpnet")
    from annotated_mpnet.explain.command import run_explain

    with redirect_stdout(_Spoken()):
        run_explain(command)


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
    _open_standard_streams()
    if "--debug" in arguments:
        _log_everything()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        with listening():
            with suppress(SystemExit):  # after --help
                command(arguments)
            _print_product("")
    except FailedElsewhereError as failure:
        time.sleep(SILENT_RANKS_WAIT)
        return failure.exit_code
    except UserError as error:
        log.debug("traceback of the error:", exc_info=True)
        return _failed(program, str(error), error.exit_code)
    except Stopped as stopped:
        if not _is_first_rank():
            return stopped.exit_code
        return _failed(program, f"stopped by {stopped}", stopped.exit_code, kind="")
    except BrokenPipeError:
        _silence(sys.stdout)
        return 141
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        log.debug("traceback of the error:", exc_info=True)
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return _failed(program, f"{error.strerror}: {' -> '.join(names) or 'no file named'}", 6)
    except (MemoryError, ImportError) as error:
        # Where memory is limited, even a library may not fit.
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        return _failed(program, "out of memory on this machine; give the process more", 7)
    return 0


def _failed(program: str, message: str, code: int, kind: str = "error: ") -> int:
    # On a full disk or a closed terminal the exit code is all that can still be said.
    with suppress(OSError, ValueError):
        print(f"{program}: {kind}{printable(message)}", file=sys.stderr, flush=True)
    return code


def _open_standard_streams() -> None:
    """Make standard input, output and error usable, whatever the caller did to them.

    A closed one (`>&-`) becomes /dev/null; otherwise the next file that is opened would take its
    place, and read what was meant for a terminal. A name that the encoding cannot write is escaped.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence(stream: IO[str]) -> None:
    """Let what is still in a stream's buffer go nowhere; Python flushes again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_product(text: str) -> None:
    """Print what the user has asked for; raises `WriteError` if it cannot be printed."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence(sys.stdout)
        raise WriteError(f"standard output cannot be written: {error.strerror}") from error


class _Spoken(io.TextIOBase):
    """Standard output for what is only said: the first error silences it; a closed pipe is raised.

    Everything else that a console asks of a file is the stream's own.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            raise
        except OSError as error:
            _silence(self._stream)
            log.debug("standard output cannot be written: %s", error)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_password(super().format(record))


def _log_everything() -> None:
    """Let us and the libraries that read text and weights log to standard error."""
    # The libraries read these once, when they are imported, which is later.
    for library in ("DATASETS", "HF_HUB", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "debug")
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(f"%(asctime)s{rank} %(name)s: %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.DEBUG)
