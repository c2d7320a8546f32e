"""The reference of all flags, as Markdown: `docs/configuration.md`.

    python -m annotated_mpnet.settings.reference > docs/configuration.md

It is generated, from the same docstrings as `--help`, and a test fails while the file is not what
this module writes: documentation that is written by hand beside a program is wrong after a year.
`--help` shows the same where it is needed; the file is for reading in a browser, for links to a
flag, and for searching.

>>> from annotated_mpnet.settings.fields import settings_of
>>> from annotated_mpnet.mpnet.config import OptimizationConfig
>>> decay = [each for each in settings_of(OptimizationConfig) if each.name == "weight_decay"][0]
>>> print(_entry(decay))
#### `--weight-decay` FLOAT
<BLANKLINE>
AdamW: decay per unit of learning rate (paper: 0.01): an update at rate lr takes the share lr x
weight-decay off each weight. Biases and norms are exempt.
<BLANKLINE>
(default: 0.01; 0 to 1; also -wd)

Next: nothing; this is the end of the command line. The run begins in `runs/run.py`.
"""

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator

from annotated_mpnet.settings.commands import ConvertCommand, PretrainCommand, TokenizerCommand
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.fields import Setting, one_paragraph, settings_of
from annotated_mpnet.settings.preset_files import KEYS, preset_names, read_header

WIDTH = 100

INTRODUCTION = """\
# All flags

This file is generated from the program, by `python -m annotated_mpnet.settings.reference`; a test keeps it
up to date. The same text is shown by `--help`.

A flag may be written with dashes or underscores, its value after a blank or after `=`. What says
yes or no has two forms: `--resume` and `--no-resume`. Where a setting is given more than once, this
is the order, the last one winning: default, `--preset`, `--config FILE`, command line.

A file for `--config` has a table for each group below and a key for each flag, with underscores;
YAML does as well. `pretrain-mpnet --print-config` writes one with all settings and explanations.

```toml
[model]
encoder_layers = 6
normalize_before = true

[optimization]
lr = 1e-3
```
"""


def configuration_markdown() -> str:
    """Return the whole reference.

    >>> text = configuration_markdown()
    >>> [line for line in text.splitlines() if line.startswith("## ")]
    ['## pretrain-mpnet', '## convert-to-hf', '## train-mpnet-tokenizer']
    """
    return "\n\n".join(part.strip("\n") for part in _parts()) + "\n"


def _parts() -> Iterator[str]:
    # One blank line between two parts; a part does not know what is before or behind it.
    yield INTRODUCTION
    yield from _command("pretrain-mpnet", PretrainCommand)
    for group in dataclasses.fields(PretrainingConfig):
        assert isinstance(group.default_factory, type)
        yield f"### {_sentence(group.default_factory)}\n\nIn a file: `[{group.name}]`."
        yield from map(_entry, settings_of(group.default_factory))
    yield from _presets()
    yield from _command("convert-to-hf", ConvertCommand)
    yield from _command("train-mpnet-tokenizer", TokenizerCommand)


def _command(name: str, kind: type) -> Iterator[str]:
    """Yield what a command is for, and its own flags, not those of groups in it."""
    yield f"## {name}"
    # A paragraph is broken anew; what is indented there is code here too.
    for text in (inspect.getdoc(kind) or "").split("\n\n"):
        yield text if text.startswith(" ") else _filled(one_paragraph(text))
    yield from map(_entry, settings_of(kind))


def _presets() -> Iterator[str]:
    """Yield the headers of the presets (`settings/preset_files.py`), in their words."""
    yield "### Presets\n\n`--preset NAME`. What was not measured says so."
    for name in preset_names():
        header = read_header(name)
        lines = [f"#### `{name}`", "", _filled(f"{header.title[0].upper()}{header.title[1:]}."), ""]
        for key in KEYS[:-1]:
            text = f"- {key}: {vars(header)[key]}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        yield "\n".join([*lines, f"- command: `{header.command}`"])


def _entry(setting: Setting) -> str:
    """Return a flag with its explanation, under a heading of its own, so that links can lead there.

    Hyphenated names stay in one piece wherever lines are broken: `--dry-run` at the end of a line
    could not be searched for.
    """
    # The only argument without dashes: what `train-mpnet-tokenizer` reads.
    name = setting.flag if setting.name != "files" else "FILES"
    heading = f"#### `{name}` {setting.kind}".rstrip()
    hint = "required" if setting.default is dataclasses.MISSING else setting.hint
    return "\n\n".join([heading, _filled(setting.help), *([f"({hint})"] if hint else [])])


def _sentence(group: type) -> str:
    return one_paragraph(group.__doc__).rstrip(".")


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    print(configuration_markdown(), end="")
