"""Settings in files: presets, `--config FILE` in TOML or YAML, and the `config.toml` of a run.

A table for each group of `PretrainingConfig`, a key for each field:

>>> arguments_from_toml("[model]\\nencoder_layers = 3\\nnormalize_before = true", "demo.toml")
['--encoder-layers=3', '--normalize-before']

As this shows, a file is read as the command line that it stands for. So there is one parser, one
check and one message for a value wherever it comes from, and what overrides what is a matter of
order (`settings/parsing.py`). YAML is another spelling of the same tables:

>>> import yaml
>>> document = yaml.safe_load("model: {encoder_layers: 3, normalize_before: true}")
>>> arguments_from(document, "demo.yaml")
['--encoder-layers=3', '--normalize-before']

**The way back is exact.** What a run was started with is written as the `config.toml` of its
directory, in full, defaults too, so that the run can be repeated when a default has changed.

>>> from annotated_mpnet.mpnet.config import OptimizationConfig
>>> config = PretrainingConfig(optimization=OptimizationConfig(lr=0.002))
>>> text = to_toml(config)
>>> [line for line in text.splitlines() if line.startswith(("[opt", "lr", "warmup"))]
['[optimization]', 'lr = 0.002']
>>> "--lr=0.002" in arguments_from_toml(text, "config.toml")
True

(`warmup_updates` is unset, which means a tenth of all updates. TOML has no word for unset, so that
such a key is left out; its default is None, and so what is left out comes back as it was.)

**The long form** is for somebody who begins a file of his own: `--print-config` writes the help of
each setting above it, and what is unset as a comment, ready to be filled in.

>>> lines = to_toml(config, commented=True).splitlines()
>>> where = lines.index("lr = 0.002")
>>> print("\\n".join(lines[where - 5 : where + 1]))
# Peak learning rate, reached at the end of the warm-up: about the step that
# each weight takes in an update. The paper's for 8192 sequences; smaller
# batches and larger networks want less, tiny networks more (3e-3 in the preset
# demo).
# (default: 0.0006; >0 to 1)
lr = 0.002
>>> [line for line in lines if "warmup_updates =" in line]
['# warmup_updates = INT']

Others (torchtitan, axolotl) let a file define the program's types, or run code to make one. Here a
file holds values and nothing else: it may come from a stranger.

Next: `settings/commands.py`, what else a command can be told.
"""

import dataclasses
import difflib
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import get_args

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.config import flag
from annotated_mpnet.settings.config import PretrainingConfig, fields_of
from annotated_mpnet.settings.fields import one_paragraph, settings_of
from annotated_mpnet.settings.preset_files import Preset, preset_text

YAML_ENDINGS = (".yaml", ".yml")


def to_toml(config: PretrainingConfig, *, commented: bool = False) -> str:
    """Write a whole configuration.

    Args:
        config: what to write; unset fields are left out.
        commented: write help and range above each setting, and unset ones as comments.
    """
    lines = list(_commented_lines(config) if commented else _plain_lines(config))
    return "\n".join(lines).lstrip("\n") + "\n"


def _plain_lines(config: PretrainingConfig) -> Iterator[str]:
    for group in dataclasses.fields(config):
        yield from ("", f"[{group.name}]")
        for name, value in vars(vars(config)[group.name]).items():
            if value is not None:
                yield f"{name} = {_toml(value)}"


def _commented_lines(config: PretrainingConfig) -> Iterator[str]:
    yield "# All settings of pretrain-mpnet. To run with them: pretrain-mpnet --config FILE"
    for group in dataclasses.fields(config):
        values = vars(config)[group.name]
        yield from ("", "", f"[{group.name}]")
        yield from _comment(one_paragraph(type(values).__doc__))
        for each in settings_of(type(values)):
            value = vars(values)[each.name]
            yield from ("", *_comment(each.help))
            if each.hint:
                yield f"# ({each.hint})"
            if value is None:
                # Something to replace, of the right kind: a text in quotes, a number without.
                blank = each.kind if each.kind in ("INT", "FLOAT") else _toml(each.kind)
                yield f"# {each.name} = {blank}"
            else:
                yield f"{each.name} = {_toml(value)}"


def _comment(text: str) -> list[str]:
    # 80 columns, for it is looked at in a terminal before it is kept in a file.
    return [f"# {line}" for line in textwrap.wrap(text, 78, break_on_hyphens=False)]


def _toml(value: object) -> str:
    # Here and not above: Python reads TOML by itself, and only a run or --print-config writes it.
    import tomlkit

    return tomlkit.item(str(value) if isinstance(value, Path) else value).as_string()


def arguments_from_toml(text: str, origin: str) -> list[str]:
    """Translate a TOML text to command-line arguments.

    Args:
        text: tables of settings.
        origin: what messages call it: a path, or the name of a preset.

    Raises:
        ConfigError: not TOML, or `arguments_from` refuses it; names `origin`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from error
    return arguments_from(document, origin)


def arguments_from_yaml(text: str, origin: str) -> list[str]:
    """Translate a YAML text to command-line arguments, as `arguments_from_toml` does.

    >>> arguments_from_yaml("optimization: {lr: 3e-4, warmup_updates: null}", "mine.yaml")
    ['--lr=3e-4', '--warmup-updates=None']
    >>> arguments_from_yaml("model: [", "mine.yaml")
    Traceback (most recent call last):
    annotated_mpnet.errors.ConfigError: mine.yaml is not valid YAML: while parsing a flow node ...
    """
    import yaml  # type: ignore[import-untyped]

    try:
        # Safe: plain values only. YAML can also name a class to be called, which `load` would do.
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {one_paragraph(str(error))}") from error
    # An empty file is a file without settings, in YAML as in TOML.
    return arguments_from({} if document is None else document, origin)


def arguments_from(document: object, origin: str) -> list[str]:
    """Translate tables of settings to command-line arguments.

    Whether a value makes sense is left to the parser of the command line; here it is only made
    sure that it is one value, and of a setting that exists.

    >>> arguments_from({"model": {"layers": 3}}, "demo.toml")
    Traceback (most recent call last):
    annotated_mpnet.errors.ConfigError: demo.toml has 'layers' in [model], which is no setting ...

    Raises:
        ConfigError: an unknown table or key, or a value that no flag can have; names `origin`.
    """
    # A typo must not go unnoticed: the run would take the default, for days perhaps.
    known = {each.name: (group, each) for group, each in fields_of(PretrainingConfig())}
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"{origin} is not a set of tables such as [model], but {_shown(document)}"
        )
    arguments = []
    for group, table in document.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{origin} has {_shown(group)} outside of a table; {_place(group)}")
        for name, value in table.items():
            if name not in known or known[name][0] != group:
                raise ConfigError(
                    f"{origin} has {_shown(name)} in [{str(group)[:80]}], which is no setting "
                    f"there; {_place(name)}"
                )
            arguments.append(_argument(known[name][1], value, origin))
    return arguments


def _place(name: object) -> str:
    """Say where a setting belongs that stands in a wrong place, or under a wrong name.

    >>> _place("layers"), _place("dropuot")
    ('--encoder-layers is encoder_layers in [model]', '--dropout is dropout in [model]')
    """
    groups = {each.name: group for group, each in fields_of(PretrainingConfig())}
    # Half of a name (`layers`) is meant more often than one that merely looks alike.
    longer = [each for each in groups if str(name) in each]
    for meant in [*longer, *difflib.get_close_matches(str(name), groups)][:1]:
        return f"{flag(meant)} is {meant} in [{groups[meant]}]"
    return "pretrain-mpnet --print-config prints all tables with all settings"


def _argument(field: dataclasses.Field[object], value: object, origin: str) -> str:
    """Return a setting of a file as an argument.

    A value stands in the same argument as its flag. In one of its own, a name that begins with a
    hyphen would be taken for the next flag.
    """
    may_be_unset = NoneType in get_args(field.type)
    if isinstance(value, bool) != (field.type is bool) or not (
        isinstance(value, bool | int | float | str) or (value is None and may_be_unset)
    ):
        wanted = "true or false" if field.type is bool else "a number or a text in quotes"
        raise ConfigError(f"{origin}: {field.name} is {_shown(value)}; expected {wanted}")
    # A flag that says yes or no has no value: `--resume`, `--no-resume`.
    if isinstance(value, bool):
        return flag(field.name) if value else flag(f"no-{field.name}")
    return f"{flag(field.name)}={value}"


def _shown(value: object) -> str:
    return repr(value)[:80]


def read_config_file(path: Path) -> list[str]:
    """Return the arguments that a configuration file stands for; its ending tells TOML from YAML.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is refused by `arguments_from`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8: {error}") from error
    read = arguments_from_yaml if path.suffix.lower() in YAML_ENDINGS else arguments_from_toml
    return read(text, str(path))


def read_preset(name: Preset) -> list[str]:
    """Return the arguments that a preset stands for."""
    return arguments_from_toml(preset_text(name), f"preset {name}")
