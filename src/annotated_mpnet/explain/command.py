"""`explain-mpnet`: check what was asked for, explain, draw."""

import os
from pathlib import Path

from rich.console import Console

from annotated_mpnet.conversion.proof import quiet_transformers
from annotated_mpnet.errors import ConfigError, shown
from annotated_mpnet.explain.explanation import Explanation, explain
from annotated_mpnet.explain.model import Asked, load
from annotated_mpnet.explain.page import page
from annotated_mpnet.explain.picture import png, require_matplotlib
from annotated_mpnet.explain.sentence import word_tokenizer
from annotated_mpnet.explain.terminal import escaped, show
from annotated_mpnet.files.atomic import write_file
from annotated_mpnet.files.output import write_errors
from annotated_mpnet.mpnet.config import check_ranges
from annotated_mpnet.settings.commands import ExplainCommand
from annotated_mpnet.settings.config import check_corruption
from annotated_mpnet.text.tokenizer import load_tokenizer

MADE_BY = b"explain-mpnet"
"""Among the first bytes of each file that this command writes."""

WORDS = (
    "a token for each word and punctuation mark (--tokenizer-name or --checkpoint give real ones)"
)


def run_explain(command: ExplainCommand, console: Console | None = None) -> Explanation:
    """Explain a sentence on the console, and in the files that were asked for.

    Raises:
        CheckpointError, ConfigError, WriteError: what is wrong; nothing was written.
    """
    console = console or Console()
    _check_numbers(command)
    _check_files(command)
    explanation = _explain(command)
    show(explanation, console)
    if command.html is not None:
        _write(console, command.html, page(explanation).encode())
    if command.png is not None:
        _write(console, command.png, *png(explanation))
    return explanation


def _explain(command: ExplainCommand) -> Explanation:
    text, name = " ".join(command.sentence), command.tokenizer_name
    asked: Asked | None = None
    about: list[str] = []
    if command.checkpoint is not None:
        asked = load(command.checkpoint, name)
        tokenizer, name = asked.tokenizer, asked.tokenizer_name
        about = [f"model: {command.checkpoint}", *(f"note: {each}" for each in asked.notes)]
    elif name is None:
        tokenizer, name = word_tokenizer(text), WORDS
    else:
        with quiet_transformers():
            tokenizer = load_tokenizer(name)
    return explain(
        text,
        tokenizer,
        command.objective,
        predict=command.predict,
        seed=command.seed,
        about=[f"tokenizer: {name}", *about],
        asked=asked,
    )


def _check_numbers(command: ExplainCommand) -> None:
    try:
        check_ranges(command)
        check_ranges(command.objective)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_corruption(command.objective)


def _check_files(command: ExplainCommand) -> None:
    """Refuse a file that may not be written, before a model is loaded."""
    if command.png is not None:
        require_matplotlib()
    files = {"--html": command.html, "--png": command.png}
    given = {flag: os.path.realpath(path) for flag, path in files.items() if path is not None}
    if len(set(given.values())) < len(given):
        raise ConfigError(f"--html and --png are the same file, {shown(str(command.png))}")
    for flag, target in given.items():
        named = f"{flag} is {shown(str(files[flag]))}"
        if os.path.isfile(target):
            with open(target, "rb") as file:
                is_ours = MADE_BY in file.read(400)
            if not command.overwrite:
                raise ConfigError(f"{named}, which exists; give another name, or --overwrite")
            if not is_ours:
                raise ConfigError(f"{named}, which explain-mpnet did not write; give another name")
        elif os.path.lexists(target):
            raise ConfigError(f"{named}, which is not a file; expected a name that is free")
        elif not os.path.isdir(os.path.dirname(target)):
            raise ConfigError(f"{named}, and there is no such directory; make it, or give another")


def _write(console: Console, path: Path, data: bytes, note: str = "") -> None:
    target = Path(os.path.realpath(path))
    with write_errors(path):
        write_file(target, data)
    console.print(escaped(f"wrote {path}{note}"), markup=False, highlight=False, soft_wrap=True)
