"""Settings in files: presets, `--config FILE`, and the `config.toml` of a run.

A file has a table for each group of `PretrainingConfig` and a key for each field. It is read as the
command line that it is short for, so values from a file are checked by the same code:

>>> arguments_from_toml("[model]\\nencoder_layers = 3\\nnormalize_before = true", "demo.toml")
['--encoder-layers=3', '--normalize-before']

A run writes all of its settings, defaults included, to `config.toml`. The run can then be repeated
even if a default has changed. TOML has no null, so unset settings are left out.

>>> from annotated_mpnet.mpnet.config import OptimizationConfig
>>> text = to_toml(PretrainingConfig(optimization=OptimizationConfig(lr=0.002)))
>>> [line for line in text.splitlines() if line.startswith(("[opt", "lr", "warmup"))]
['[optimization]', 'lr = 0.002']

`--print-config` writes the same with the help of each setting, and unset ones as comments.

What a user does in one start (`ACTIONS`: resume, overwrite, ...) is not a setting. It is not
written, and ignored with a note in a file that has it, such as a `config.toml` from before this
rule: `--config` of a run that once replaced another must not delete that run.

A preset is a TOML file in `presets/` with a header of comments: purpose, model, cost, expected
result, command. `--preset list` and `docs/configuration.md` show the header.

>>> read_header("demo").command
'pretrain-mpnet --preset demo'
"""

import dataclasses
import difflib
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from annotated_mpnet.errors import ConfigError, shown, without_password
from annotated_mpnet.mpnet.config import flag
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.fields import Setting, all_settings, one_paragraph, settings_of
from annotated_mpnet.settings.foreign_flags import flag_in, pointer

Preset = Literal["demo", "tiny", "small", "base", "continue"]


ACTIONS = (
    *("resume", "autoresume", "resume_checkpoint", "overwrite", "allow_change"),
    *("trust_checkpoint", "debug"),
)
"""Fields of `RunConfig` that only the command line can give."""

LARGEST_FILE = 2**20
"""Bytes of a configuration file. All settings with all explanations have 30,000."""


@dataclass(frozen=True)
class Header:
    """The header of a preset. `expected` is its result, `cost` its time and machine."""

    title: str
    purpose: str
    model: str
    cost: str
    expected: str
    command: str


def preset_names() -> tuple[Preset, ...]:
    """Return the names of all presets, cheapest first."""
    return get_args(Preset)


def read_preset(name: Preset) -> list[str]:
    """Return a preset as command-line arguments."""
    return arguments_from_toml(_preset_text(name), f"preset {name}")


def _preset_text(name: Preset) -> str:
    path = resources.files("annotated_mpnet.settings") / "presets" / f"{name}.toml"
    return path.read_text(encoding="utf-8")


def read_header(name: Preset) -> Header:
    """Read the header of a preset.

    >>> read_header("demo").title
    "the whole pipeline in a few minutes on a laptop's CPU"
    """
    title, header, *_ = _preset_text(name).split("\n#\n")
    # `# Key   text`; an indented line continues the text.
    entries = re.findall(r"^# ([A-Z]\w+) +(.*(?:\n#  .*)*)", header, re.MULTILINE)
    values = {key.lower(): re.sub(r"\n# +", " ", text) for key, text in entries}
    return Header(title=title.partition(": ")[2], **values)


def preset_list(width: int) -> str:
    """Return what `--preset list` prints, in lines of at most `width` columns."""
    blocks = []
    for name in preset_names():
        header = dataclasses.asdict(read_header(name))
        lines = [f"{name:<10}{header['title']}"]
        for key in ("model", "cost", "expected", "command"):
            lines += textwrap.wrap(
                f"{key:<10}{header[key]}",
                width,
                initial_indent=" " * 10,
                subsequent_indent=" " * 20,
                break_on_hyphens=False,
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def to_toml(config: PretrainingConfig, *, commented: bool = False) -> str:
    """Write all settings as TOML; `commented` adds help, ranges, and unset settings."""
    return "\n".join(_toml_lines(config, commented)).lstrip("\n") + "\n"


def _toml_lines(config: PretrainingConfig, commented: bool) -> Iterator[str]:
    if commented:
        yield "# All settings of pretrain-mpnet. To run with them: pretrain-mpnet --config FILE\n"
    for name, group in vars(config).items():
        yield from ("", f"[{name}]")
        if commented:
            yield from _comment(one_paragraph(type(group).__doc__))
        for each in settings_of(type(group)):
            if each.name in ACTIONS:
                continue
            value = vars(group)[each.name]
            if commented:
                yield from ("", *_comment(each.help))
                yield from [f"# ({each.hint})"] if each.hint else []
            if value is not None:
                yield f"{each.name} = {_toml(value)}"
            elif commented:
                # A placeholder to replace: a text in quotes, a number without.
                kind = each.kind
                blank = kind if kind in ("INT", "FLOAT") else _toml(kind)
                blank = f"[{blank}, {blank}]" if each.several else blank
                yield f"# {each.name} = {blank}"


def _comment(text: str) -> list[str]:
    # 80 columns, for a terminal.
    return [f"# {line}" for line in textwrap.wrap(text, 78, break_on_hyphens=False)]


def _toml(value: object) -> str:
    # Imported here: most commands only read TOML, which the standard library does.
    import tomlkit

    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    text = isinstance(value, str | Path)
    return tomlkit.item(without_password(str(value)) if text else value).as_string()


def read_config_file(path: Path) -> list[str]:
    """Return a configuration file as command-line arguments. `.yaml` and `.yml` are YAML.

    Raises:
        ConfigError: it cannot be read, or `arguments_from` refuses it.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"--config {path} is not a regular file; expected TOML or YAML")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"--config {path} has {size:,} bytes; expected at most 1 MB")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8: {error}") from error
    if path.suffix.lower() not in (".yaml", ".yml"):
        return arguments_from_toml(text, str(path))
    return arguments_from(_from_yaml(text, path), str(path))


def _from_yaml(text: str, path: Path) -> object:
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML lets the last of two equal keys win; TOML refuses them, and so do we."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"the key {shown(key)} is there twice")
            return dict(super().construct_mapping(node, deep))

    try:
        document = Loader(text).get_single_data()
    # Its constructors raise whatever Python raises for "!!int abc" or a thousand brackets.
    except Exception as error:
        reason = one_paragraph(str(error))[:200] or type(error).__name__
        raise ConfigError(f"{path} is not valid YAML: {reason}") from error
    # An empty YAML file is None, an empty TOML file {}.
    return {} if document is None else document


def arguments_from_toml(text: str, origin: str) -> list[str]:
    """Translate TOML to command-line arguments; messages call it `origin`."""
    try:
        document = tomllib.loads(text)
    # A number of 5,000 digits is a ValueError, which a TOMLDecodeError is too.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not valid TOML: {str(error)[:200]}") from error
    return arguments_from(document, origin)


def arguments_from(document: object, origin: str) -> list[str]:
    """Translate tables of settings to command-line arguments.

    Unknown names are refused, as a typo would silently train with the default. Values are checked
    by the parser later.

    >>> arguments_from({"model": {"layers": 3}}, "demo.toml")
    Traceback (most recent call last):
    annotated_mpnet.errors.ConfigError: demo.toml: [model] has no setting 'layers'; ...
    """
    known = {each.name: each for each in all_settings(PretrainingConfig)}
    if not isinstance(document, Mapping):
        raise ConfigError(f"{origin} is {shown(document)}; expected tables such as [model]")
    arguments = []
    for group, table in document.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{origin}: {shown(group)} is outside of a table; {_place(group)}")
        for name, value in table.items():
            if name not in known or known[name].group != group:
                raise ConfigError(
                    f"{origin}: [{str(group)[:80]}] has no setting {shown(name)}; {_place(name)}"
                )
            if name in ACTIONS:
                if value not in (False, None, ""):
                    print(
                        f"note: {origin}: {name} is ignored in a file; give {flag(name)} on the "
                        "command line if you mean it",
                        file=sys.stderr,
                    )
                continue
            arguments += _arguments(known[name], value, origin)
    return arguments


def _place(name: object) -> str:
    """Say where a misplaced or misspelled setting belongs.

    >>> _place("layers"), _place("dropuot")
    ('--encoder-layers is encoder_layers in [model]', '--dropout is dropout in [model]')
    >>> _place("learning_rate"), _place("epochs")
    ('--lr is lr in [optimization]', '--total-updates is total_updates in [optimization]')
    """
    groups = {each.name: each.group for each in all_settings(PretrainingConfig)}
    said = pointer(str(name), {flag(each) for each in groups})
    # A part of a name (`layers`) is a better guess than a name that is merely similar.
    longer = [each for each in groups if str(name) in each]
    known = [each for each in groups if said and flag(each) == flag_in(said)]
    for meant in [*known, *longer, *difflib.get_close_matches(str(name), groups)][:1]:
        return f"{flag(meant)} is {meant} in [{groups[meant]}]"
    return "pretrain-mpnet --print-config prints all tables with all settings"


def _arguments(setting: Setting, value: object, origin: str) -> list[str]:
    """Return a setting as arguments: a list as `--flag` and its values, others as one."""
    if isinstance(value, bool) and setting.type is bool:
        return [setting.flag if value else flag(f"no-{setting.name}")]
    if not isinstance(value, list) or not setting.several:
        # In one argument, as the value may begin with a hyphen.
        return [f"{setting.flag}={_text(setting, value, origin)}"]
    if not value:
        raise ConfigError(f"{origin}: {setting.name} is an empty list; expected one value or more")
    texts = [_text(setting, each, origin) for each in value]
    # A path that begins with a hyphen would be a flag.
    return [setting.flag, *(f"./{each}" if each.startswith("-") else each for each in texts)]


def _text(setting: Setting, value: object, origin: str) -> str:
    is_unset = value is None and setting.optional
    if setting.type is bool or not (is_unset or type(value) in (int, float, str)):
        wanted = "true or false" if setting.type is bool else "a number or a text in quotes"
        raise ConfigError(f"{origin}: {setting.name} is {shown(value)}; expected {wanted}")
    return str(value)
