"""Command line -> command: one argparse parser, made from the fields of a command.

A preset and a configuration file are read as the command lines that they are short for
(`settings/config_file.py`). They come before what the user typed, and the last value wins:

    --preset demo              ... --encoder-layers=3 ...
    --config mine.toml                                     --encoder-layers=4 --lr=0.001
    typed                                                                     --lr 0.002
    result                     4 layers, lr 0.002, everything else from demo

Only the warm-up of a preset depends on what comes after it: a shorter run has a shorter one.

Every error is a `ConfigError` of one line. It names the flag, and the file if the value came from
one.

>>> parse_pretrain(["--encoder-layers", "three"])
Traceback (most recent call last):
annotated_mpnet.errors.ConfigError: --encoder-layers is 'three'; expected a whole number, 1 to 1000
"""

import argparse
import dataclasses
import difflib
import errno
import importlib.metadata
import inspect
import os
import platform
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from annotated_mpnet.errors import ConfigError, shown
from annotated_mpnet.mpnet.config import check_ranges
from annotated_mpnet.settings.commands import PretrainCommand
from annotated_mpnet.settings.config_file import read_config_file, read_preset
from annotated_mpnet.settings.fields import (
    Setting,
    all_settings,
    groups_of,
    one_paragraph,
    settings_of,
)
from annotated_mpnet.settings.foreign_flags import pointer

Command = TypeVar("Command")


def parse_pretrain(arguments: Sequence[str]) -> PretrainCommand:
    """Parse the arguments of `pretrain-mpnet`, with the preset and the file that they name.

    >>> command = parse_pretrain(["--preset", "demo", "-wd", "0.1"])
    >>> command.settings.model.encoder_layers, command.settings.optimization.weight_decay
    (3, 0.1)

    Whether settings fit together is left to `PretrainingConfig.validate`.
    """
    typed = _given(PretrainCommand, arguments, "pretrain-mpnet")
    command = _build(PretrainCommand, typed)
    preset: dict[str, Any] = {}
    if command.preset is not None and command.preset != "list":
        preset = _layer(f"preset {command.preset}", read_preset(command.preset))
    config: dict[str, Any] = {}
    if command.config is not None:
        config = _layer(str(command.config), read_config_file(command.config))
    warmup = shorter_warmup(preset, config | typed)
    below = preset | config
    notes: tuple[str, ...] = ()
    if warmup is not None:
        below["warmup_updates"] = warmup
        notes = (
            f"warm-up: {warmup:,} updates (preset {command.preset}: {preset['warmup_updates']:,} "
            f"of {preset['total_updates']:,}, shortened like --total-updates)",
        )
    return dataclasses.replace(_build(PretrainCommand, below | typed), notes=notes)


def _layer(origin: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what a preset or a file gives, checked alone: merged, it has no origin any more."""
    try:
        given = _given(PretrainCommand, arguments, "pretrain-mpnet")
        for group in vars(_build(PretrainCommand, given).settings).values():
            check_ranges(group)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{origin}: {error}") from None
    return given


def shorter_warmup(preset: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """Return the warm-up of a preset in a run that was made shorter; None if it stays.

    >>> demo = {"total_updates": 1000, "warmup_updates": 50}
    >>> shorter_warmup(demo, {"total_updates": 200}), shorter_warmup(demo, {"total_updates": 5000})
    (10, None)
    >>> shorter_warmup(demo, {"total_updates": 200, "warmup_updates": 40}) is None
    True
    """
    total = preset.get("total_updates", 0)
    if "warmup_updates" not in preset or "warmup_updates" in given:
        return None
    wanted = given.get("total_updates", total)
    # At least 1 of a total that is wrong too; the error is about the total then.
    return max(1, round(preset["warmup_updates"] * wanted / total)) if wanted < total else None


def parse(kind: type[Command], arguments: Sequence[str], program: str) -> Command:
    """Parse the arguments of a command.

    Raises:
        ConfigError: the first thing that is wrong.
        SystemExit: after `--help`.
    """
    given = _given(kind, arguments, program)
    missing = [
        each.flag
        for each in all_settings(kind)
        if each.default is dataclasses.MISSING and not given.get(each.name)
    ]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"{' and '.join(missing)} {are} missing; see {program} --help")
    return _build(kind, given)


def _given(kind: type, arguments: Sequence[str], program: str) -> dict[str, Any]:
    """Return the values that the arguments give, by the name of the field, without defaults."""
    settings = {each.flag: each for each in all_settings(kind)}
    aliases = {alias: each.flag for each in settings.values() for alias in each.aliases}
    positional = [name for name, each in settings.items() if each.is_positional]
    parser = _Parser(
        prog=program,
        usage="%(prog)s [OPTIONS]" + "".join(f" {name}..." for name in positional),
        description=inspect.getdoc(kind),
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.settings = settings
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="Print the versions of this program, Python and the main libraries, and exit.",
    )
    _add_flags(parser, kind)
    # argparse would accept any beginning of `-num_buckets`, so it sees only the flag itself.
    spelled, as_typed = [], {}
    for argument in arguments:
        typed, equals, value = argument.partition("=")
        name = typed.replace("_", "-") if typed.startswith("--") else typed
        name = aliases.get(name, name)
        spelled.append(name + equals + value)
        as_typed[name] = typed
    given, unknown = parser.parse_known_args(spelled)
    _refuse_repeated(spelled, settings)
    if unknown:
        # All at once: a command that was written for another program has several.
        names = dict.fromkeys(each.partition("=")[0] for each in unknown if each.startswith("-"))
        found = {name: pointer(name, settings) for name in names}
        if pointed := [f"{as_typed[name]} (here: {said})" for name, said in found.items() if said]:
            others = [as_typed[name] for name, said in found.items() if not said]
            parser.error(f"unrecognized arguments: {'; '.join([*pointed, *others])[:600]}")
        similar = difflib.get_close_matches(unknown[0].partition("=")[0], settings, 1)
        perhaps = f" (perhaps you meant {similar[0]})" if similar else ""
        if not unknown[0].startswith("-"):
            perhaps = " (this flag takes one value; for several files give their directory)"
        parser.error(f"unrecognized arguments: {one_paragraph(' '.join(unknown))[:80]}{perhaps}")
    return vars(given)


def _refuse_repeated(arguments: Sequence[str], settings: dict[str, Setting]) -> None:
    """Refuse a flag that is given twice: argparse would let the last value win in silence."""
    seen: dict[str, str] = {}
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        positive = name.replace("--no-", "--", 1)
        name = positive if name not in settings and positive in settings else name
        if name not in settings:
            continue
        said = value if equals else argument if settings[name].type is bool else following
        if name in seen:
            raise ConfigError(
                f"{name} is given twice, as {shown(seen[name])} and {shown(said)}; give it once"
            )
        seen[name] = said


def _build(kind: type[Command], given: dict[str, Any]) -> Command:
    groups: dict[str, Any] = {name: _build(group, given) for name, group in groups_of(kind).items()}
    mine = [each for each in settings_of(kind) if each.name in given]
    own = {each.name: _joined(each, given[each.name]) for each in mine}
    return kind(**groups, **own)


def _joined(setting: Setting, value: Any) -> object:
    """Return the values of a flag that takes several: a single path stays a path."""
    if not setting.several or setting.is_positional:
        return value
    if value == [None]:
        return None
    return value[0] if len(value) == 1 and setting.type is Path else tuple(value)


def _add_flags(into: argparse._ActionsContainer, kind: type) -> None:
    """Add the flags of a dataclass, and those of each group in it under a heading of their own."""
    for each in settings_of(kind):
        options: dict[str, Any] = {"type": partial(_value, each), "metavar": each.kind}
        if each.is_positional:
            options |= {"nargs": "*", "metavar": each.flag}
        elif each.several:
            options |= {"nargs": "+"}
        elif each.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        hint = f" ({each.hint})" if each.hint else ""
        name = each.name if each.is_positional else each.flag
        into.add_argument(name, help=(each.help + hint).replace("%", "%%"), **options)
    for name, group in groups_of(kind).items():
        # `PretrainCommand.settings` is a group of groups, without flags of its own.
        has_flags = bool(settings_of(group))
        about = f"{name} options", one_paragraph(group.__doc__)
        _add_flags(into.add_argument_group(*about) if has_flags else into, group)


def _value(setting: Setting, text: str) -> object:
    """Make a value of a text; argparse lets the `ConfigError` pass through."""
    if setting.optional and text == "None":
        return None
    if setting.type in (str, Path) and not setting.choices:
        _check_name(setting, text)
    try:
        if not setting.choices or text in setting.choices:
            return setting.type(text)
    except ValueError:
        pass
    raise ConfigError(f"{setting.flag} is {shown(text)}; expected {setting.expected}")


PLACES = ("tokenizer_name", "hf_model_path", "dataset_name", "checkpoint")
"""Texts that may be paths."""

MAY_BE_EMPTY = ("allow_change", "dataset_name")


def _check_name(setting: Setting, text: str) -> None:
    """Refuse a name or path that no file can have, or that may not be looked at.

    Later it would fail in one of many places, after hours of packing perhaps. An empty one is an
    unset variable of a shell; as a path it would be the current directory.
    """
    wrong = None
    if not text and setting.name not in MAY_BE_EMPTY:
        wrong = f"empty; expected {setting.expected}"
    elif "\0" in text:
        wrong = f"{shown(text)}, with a NUL character; expected {setting.expected}"
    elif any("\ud800" <= each <= "\udfff" for each in text):
        wrong = f"{shown(text)}, which is not UTF-8; give it another name"
    elif setting.type is Path or setting.name in PLACES:
        try:
            os.stat(text)
        except OSError as error:
            # It may be made later, or be a name on the Hub.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                wrong = f"{shown(text)}, which cannot be looked at: {error.strerror}"
    if wrong is not None:
        raise ConfigError(f"{setting.flag} is {wrong}")


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is a `ConfigError` in our words instead of two lines and an exit."""

    settings: dict[str, Setting]

    def error(self, message: str) -> NoReturn:
        """Raise a `ConfigError`.

        >>> parse_pretrain(["--lr"])
        Traceback (most recent call last):
        annotated_mpnet.errors.ConfigError: --lr has no value; expected a number, >0 to 1; ...
        """
        about = r"argument (--[\w-]+)\S*: (?:expected .*one .*|ignored .*? argument (.*))"
        if (found := re.fullmatch(about, message)) and found[1] in self.settings:
            seen = "has no value" if found[2] is None else f"is {found[2][:80]}"
            message = f"{found[1]} {seen}; expected {self.settings[found[1]].expected}"
        raise ConfigError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Print what a bug report needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and exit, without importing anything heavy."""
        versions = [f"{name} {_version_of(name)}" for name in ("torch", "transformers", "datasets")]
        versions.insert(0, f"Python {platform.python_version()}")
        print(f"annotated-mpnet {_version_of('annotated-mpnet')} ({', '.join(versions)})")
        parser.exit()


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class _HelpFormatter(argparse.HelpFormatter):
    """Never break a line at a hyphen of a flag, and keep indented lines as they are."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(part, width, break_on_hyphens=False)
            for part in text.split("\n\n")
        )
