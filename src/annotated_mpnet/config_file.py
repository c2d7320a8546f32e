"""Configurations as TOML: presets, `--config FILE`, and the `config.toml` of a run.

A table for each group of `PretrainingConfig`, a key for each field:

>>> arguments_from_toml("[model]\\nencoder_layers = 3\\nnormalize_before = true", "demo.toml")
['--encoder-layers', '3', '--normalize-before']

As this shows, a file is read as the command line that it stands for. So there is one parser, one
check and one message for a value wherever it comes from, and layers are a matter of order: the
arguments of the preset, then those of the file, then those that were typed; the last one wins.
"""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Literal

from annotated_mpnet.config import PretrainingConfig, fields_of, flag
from annotated_mpnet.errors import ConfigError

Preset = Literal["demo"]


def to_toml(config: PretrainingConfig) -> str:
    """Write a whole configuration. What is unset is left out, because TOML has no null."""
    import tomlkit

    document = tomlkit.document()
    for group, each in fields_of(config):
        value = vars(vars(config)[group])[each.name]
        if group not in document:
            document.add(group, tomlkit.table())
        if value is not None:
            document[group][each.name] = str(value) if isinstance(value, Path) else value
    return tomlkit.dumps(document)


def arguments_from_toml(text: str, origin: str) -> list[str]:
    """Translate a TOML text to command-line arguments.

    Raises:
        ConfigError: not TOML, or a table or key that does not exist; names `origin`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from error
    known = {(group, each.name) for group, each in fields_of(PretrainingConfig())}
    arguments: list[str] = []
    for group, table in document.items():
        entries = table.items() if isinstance(table, dict) else [("", table)]
        for name, value in entries:
            if (group, name) not in known:
                groups = sorted({known_group for known_group, _ in known})
                raise ConfigError(
                    f"{origin} has {name!r} in [{group}], which is no setting; expected the tables "
                    f"{', '.join(groups)} with the names that pretrain-mpnet --help lists"
                )
            if isinstance(value, bool):
                arguments.append(flag(name) if value else flag(f"no-{name}"))
            else:
                arguments += [flag(name), str(value)]
    return arguments


def read_config_file(path: Path) -> list[str]:
    """Return the arguments that a configuration file stands for."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    return arguments_from_toml(text, str(path))


def read_preset(name: Preset) -> list[str]:
    """Return the arguments that a preset stands for."""
    path = resources.files("annotated_mpnet") / "presets" / f"{name}.toml"
    return arguments_from_toml(path.read_text(encoding="utf-8"), f"preset {name}")
