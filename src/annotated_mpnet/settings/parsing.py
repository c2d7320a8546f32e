"""From a command line to a command: other spellings, layers, and a message of one line.

tyro makes a parser of a dataclass. This module tells it what to show (`settings/fields.py`), and adds what
a parser does not know:

**Other spellings.** `--encoder_layers` and `--encoder-layers` are the same; that is tyro's doing.
The short flags of annotated-mpnet, such as `-prenorm`, are rewritten to the one name that a flag
has here, before the parser sees them, so that nothing behind this module knows that they exist.

**Layers.** A preset and a configuration file are read as the command lines that they stand for
(`settings/config_file.py`), and come before what was typed. The last one wins:

    --preset demo              ... --encoder-layers=3 ...
    --config mine.toml                                     --encoder-layers=4 --lr=0.001
    typed                                                                     --lr 0.002
    what holds                     4 layers, lr 0.002, and the rest of demo

**Mistakes.** tyro draws a box around a message, and shows all flags that resemble a misspelt one.
Here a mistake is one line, which `cli.py` prints: it names the flag, and the file if the mistake is
in one, because a wrong number in a file is not found by looking at the command line.

>>> parse_pretrain(["--encoder-layers", "three"])
Traceback (most recent call last):
annotated_mpnet.errors.ConfigError: --encoder-layers is 'three'; expected a whole number, 1 to ...

fairseq: a command line becomes an `argparse.Namespace`, which any part of the program may read and
write, and which is pickled into every checkpoint. annotated-mpnet keeps that; it is why reading its
checkpoints safely takes care (`conversion/fairseq.py`). Here a command line ends as frozen
dataclasses, and what is kept of them is TOML.

Next: `cli.py`.
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.config import check_ranges
from annotated_mpnet.settings.commands import PretrainCommand
from annotated_mpnet.settings.config import aliases
from annotated_mpnet.settings.config_file import read_config_file, read_preset
from annotated_mpnet.settings.fields import Setting, all_settings, one_paragraph, settings_of

Command = TypeVar("Command")

WRONG_VALUES = (
    r"Error parsing (?P<flag>--[\w-]+): .*?(?P<value>'.*'|\".*\")",
    r"invalid choice (?P<value>'.*'|\".*\") for argument '(?P<flag>--[\w-]+)'.*",
    r"Missing value for argument '(?P<flag>--[\w-]+)'.*",
)
"""How tyro begins a message about a value. It goes on in Python's words, or with all choices in an
order that differs from call to call."""


def parse_pretrain(arguments: Sequence[str]) -> PretrainCommand:
    """Parse the arguments of `pretrain-mpnet`, under the layers that they ask for.

    >>> command = parse_pretrain(["--preset", "demo", "-wd", "0.1"])
    >>> command.settings.model.encoder_layers, command.settings.optimization.weight_decay
    (3, 0.1)

    Raises:
        ConfigError: in one line, what is wrong with the first wrong argument, and in which file.
            How settings must be to one another is left to `PretrainingConfig.validate`.
    """
    typed = _rewrite_aliases(arguments)
    asked_for = parse(PretrainCommand, typed, "pretrain-mpnet")
    below: list[str] = []
    for origin, layer in _layers(asked_for):
        # Each by itself first: all together, nobody could tell where a mistake was made.
        try:
            settings = parse(PretrainCommand, layer, "pretrain-mpnet").settings
            for group in vars(settings).values():
                check_ranges(group)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{origin}: {error}") from None
        below += layer
    if asked_for.settings.run.resuming:
        # What a preset or a file begins with is long behind a run that goes on: its weights are in
        # its checkpoint. Typed, it is a contradiction, and refused as such.
        below = [each for each in below if not each.startswith("--hf-model-path=")]
    return parse(PretrainCommand, [*below, *typed], "pretrain-mpnet") if below else asked_for


def parse(kind: type[Command], arguments: Sequence[str], program: str) -> Command:
    """Parse the arguments of a command.

    Args:
        kind: its dataclass, of `settings/commands.py`.
        arguments: without aliases; the last of several that name the same flag holds.
        program: its name, for help and messages.

    Raises:
        ConfigError: in one line, what is wrong with the first wrong argument.
        SystemExit: `--help` was asked for, and has been shown.
    """
    # tyro would join the lines of an introduction, examples to copy included.
    if {"-h", "--help"} & set(arguments):
        print(_introduction(kind), end="\n\n")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=program,
                description="",
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry(),
            )
    except SystemExit as ending:
        if ending.code in (0, None):
            raise
        message = _in_our_words(_in_one_line(said.getvalue()), kind)
        raise ConfigError(f"{message}; see {program} --help") from None


def _layers(command: PretrainCommand) -> Iterator[tuple[str, list[str]]]:
    """Yield (what messages call it, its arguments) for each layer under the command line.

    In the order in which they override each other: what is more special comes later.

    >>> [(origin, len(layer) > 5) for origin, layer in _layers(PretrainCommand(preset="demo"))]
    [('preset demo', True)]
    """
    if command.preset is not None and command.preset != "list":
        yield f"preset {command.preset}", read_preset(command.preset)
    if command.config is not None:
        yield str(command.config), read_config_file(command.config)


def _registry() -> ConstructorRegistry:
    """Return the rule by which tyro reads our dataclasses.

    By itself it would show docstrings in the lines of the source, `{None}|PATH` for a path that may
    be unset, and no ranges. A registry is tyro's way to have another opinion, for one call.
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_describe)
    return registry


def _describe(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Tell tyro of which fields a dataclass is made; None for what is not one."""
    if not dataclasses.is_dataclass(info.type):
        return None
    settings = {each.name: each for each in settings_of(info.type)}
    return StructConstructorSpec(
        instantiate=info.type,
        fields=tuple(
            _describe_field(each, settings.get(each.name)) for each in dataclasses.fields(info.type)
        ),
    )


def _describe_field(field: dataclasses.Field[object], setting: Setting | None) -> StructFieldSpec:
    """Tell tyro what to make of a field, and what to show of it.

    Args:
        field: a setting, or a group of them.
        setting: how it is described; None for a group, which is described by its own settings.
    """
    default: object = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif default is dataclasses.MISSING:
        default = tyro.MISSING
    type_: Any = field.type
    if setting is not None:
        # An empty hint is one too: without any, tyro would write "(default: None)" where the help
        # has just said what unset means.
        hint = f"({setting.hint})" if setting.hint else ""
        shown = tyro.conf.arg(metavar=setting.kind or None, help_behavior_hint=hint)
        type_ = Annotated[type_, shown]
    return StructFieldSpec(field.name, type_, default, setting.help if setting else None)


def _introduction(kind: type) -> str:
    """Return the docstring of a command, in lines that fit; what is lined up stays as it is."""
    width = shutil.get_terminal_size().columns - 1
    paragraphs = (inspect.getdoc(kind) or "").split("\n\n")
    return "\n\n".join(
        text if text.startswith(" ") else textwrap.fill(one_paragraph(text), width)
        for text in paragraphs
    )


def _in_our_words(message: str, kind: type) -> str:
    """Say what is wrong with a value: which flag, what was seen, what would have been right.

    >>> _in_our_words("Error parsing --lr: could not convert string to float: 'x'", PretrainCommand)
    "--lr is 'x'; expected a number, >0 to 1"
    >>> _in_our_words("Missing value for argument '--seed'. Expected 1 values.", PretrainCommand)
    '--seed has no value; expected a whole number, 0 to 9223372036854775807'
    """
    if missing := re.fullmatch(r"Missing from \S+: (.*)", message):
        flags = re.findall(r"(--[\w-]+) [A-Z]+ ", missing[1])
        return f"{' and '.join(flags)} {'is' if len(flags) == 1 else 'are'} missing"
    for pattern in WRONG_VALUES:
        if found := re.fullmatch(pattern, message):
            expected = {each.flag: each.expected for each in all_settings(kind)}[found["flag"]]
            value = found.groupdict().get("value")
            seen = f"is {value[:80]}" if value else "has no value"
            return f"{found['flag']} {seen}; expected {expected}"
    return message


def _in_one_line(box: str) -> str:
    """Take the message out of the box that tyro draws around it, of whatever signs.

    >>> _in_one_line("╭─ Value error ─╮\\n│ --lr: not a │\\n│ number: 'x' │\\n│ ────── │\\n│ ... │")
    "--lr: not a number: 'x'"
    >>> _in_one_line(" Value error \\n ----- \\n --lr: not a \\n number: 'x' \\n ----- \\n ... ")
    "--lr: not a number: 'x'"
    """
    # On a terminal the box is coloured.
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    lines = [line.strip("│ ") for line in plain.splitlines()[1:]]
    meant = re.search(r"Perhaps you meant:\s+(--?[\w-]+)", "\n".join(lines))
    # The message stands before the first rule, or between the first two: a terminal that cannot
    # show the signs of a box gets a rule under the title instead.
    rule = re.compile("[─-]{3,}|╰.*")
    if lines and rule.fullmatch(lines[0]):
        del lines[0]
    message = " ".join(itertools.takewhile(lambda line: not rule.fullmatch(line), lines)).strip()
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
