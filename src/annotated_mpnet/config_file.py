"""Configurations as TOML: presets, `--config FILE`, and the `config.toml` of a run.

A table for each group of `PretrainingConfig`, a key for each field:

>>> arguments_from_toml("[model]\\nencoder_layers = 3\\nnormalize_before = true", "demo.toml")
['--encoder-layers', '3', '--normalize-before']

As this shows, a file is read as the command line that it stands for. So there is one parser, one
check and one message for a value wherever it comes from, and layers are a matter of order: the
arguments of the preset, then those of the file, then those that were typed; the last one wins.

    --preset demo              ... --encoder-layers 3 ...
    --config mine.toml                                     --encoder-layers 4 --lr 0.001
    typed                                                                     --lr 0.002
    what holds                     4 layers, lr 0.002, and the rest of demo

The way back is exact: what a run was started with is written as the `config.toml` of its directory,
in full, defaults too, so that the run can be repeated when a default has changed.

>>> from annotated_mpnet.config import OptimizationConfig
>>> config = PretrainingConfig(optimization=OptimizationConfig(lr=0.002))
>>> text = to_toml(config)
>>> [line for line in text.splitlines() if line.startswith(("[opt", "lr", "warmup"))]
['[optimization]', 'lr = 0.002']
>>> arguments = arguments_from_toml(text, "config.toml")
>>> arguments[arguments.index("--lr") + 1]
'0.002'

(`warmup_updates` is unset, which means a tenth of all updates; so it is not in the file.)

Next: `cli.py`, which parses the arguments.
"""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Literal

from annotated_mpnet.config import PretrainingConfig, fields_of
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.options import flag

Preset = Literal["demo"]


def to_toml(config: PretrainingConfig) -> str:
    """Write a whole configuration. What is unset is left out, because TOML has no null.

    An unset field has None as its default, so that what is left out comes back as it was.
    """
    # Here and not above: Python reads TOML by itself, and only a run or --print-config writes it.
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

    Args:
        text: tables of settings.
        origin: what messages call it: a path, or the name of a preset.

    Raises:
        ConfigError: not TOML, or a table or key that does not exist; names `origin`. Whether a
            value makes sense is left to the parser of the command line.

    >>> arguments_from_toml("[model]\\nlayers = 3", "demo.toml")
    Traceback (most recent call last):
    annotated_mpnet.errors.ConfigError: demo.toml has 'layers' in [model], which is no setting; ...
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from error
    known = {(group, each.name) for group, each in fields_of(PretrainingConfig())}
    arguments: list[str] = []
    for group, table in document.items():
        # A setting outside of all tables is treated like one inside, and gets the same message.
        entries = table.items() if isinstance(table, dict) else [("", table)]
        for name, value in entries:
            # A typo must not go unnoticed: the run would take the default, for days perhaps.
            if (group, name) not in known:
                groups = sorted({known_group for known_group, _ in known})
                raise ConfigError(
                    f"{origin} has {name!r} in [{group}], which is no setting; expected the tables "
                    f"{', '.join(groups)} with the names that pretrain-mpnet --help lists"
                )
            # A flag that says yes or no has no value: `--resume`, `--no-resume`.
            if isinstance(value, bool):
                arguments.append(flag(name) if value else flag(f"no-{name}"))
            else:
                arguments += [flag(name), str(value)]
    return arguments


def read_config_file(path: Path) -> list[str]:
    """Return the arguments that a configuration file stands for.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or `arguments_from_toml` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    return arguments_from_toml(text, str(path))


def read_preset(name: Preset) -> list[str]:
    """Return the arguments that a preset stands for: `presets/NAME.toml`, inside the package."""
    path = resources.files("annotated_mpnet") / "presets" / f"{name}.toml"
    return arguments_from_toml(path.read_text(encoding="utf-8"), f"preset {name}")
