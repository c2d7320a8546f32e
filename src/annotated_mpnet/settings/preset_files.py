"""Presets: settings that belong together, with what they cost and what comes out.

A preset is a TOML file in `presets/`. It begins with a header in comments, because settings
without their price and their result are a riddle (the custom is big_vision's):

    # tiny: what a laptop's CPU can learn from your own text
    #
    # Purpose   ...
    # Model     ...
    # Cost      what was measured, or follows from arithmetic; else "not measured"
    # Expected  the same
    # Command   pretrain-mpnet --preset tiny ...

The header is what `pretrain-mpnet --preset list` shows, and the reference in `docs/`; there is no
second place where a preset is described.

>>> read_header("demo").command
'pretrain-mpnet --preset demo'

What a header says of sizes and amounts is computed once more in the tests, from the settings below
it. Its numbers of time and loss were measured (`docs/log.md`), and say on what.

Next: `settings/config_file.py`, which reads what is under the header.
"""

import re
import textwrap
from dataclasses import dataclass
from importlib import resources
from typing import Literal, get_args

Preset = Literal["demo", "tiny", "small", "base", "continue"]

KEYS = ("purpose", "model", "cost", "expected", "command")


@dataclass(frozen=True)
class Header:
    """What stands at the head of a preset.

    Attributes:
        title: in a few words, what it is for.
        purpose: the same at more length.
        model: layers, width, parameters.
        cost: time and machine.
        expected: the result, as a loss where there is one.
        command: to copy.
    """

    title: str
    purpose: str
    model: str
    cost: str
    expected: str
    command: str


def preset_names() -> tuple[Preset, ...]:
    """Return the names of all presets, the cheapest first.

    >>> preset_names()
    ('demo', 'tiny', 'small', 'base', 'continue')
    """
    return get_args(Preset)


def preset_text(name: Preset) -> str:
    """Return the file of a preset."""
    path = resources.files("annotated_mpnet.settings") / "presets" / f"{name}.toml"
    return path.read_text(encoding="utf-8")


def read_header(name: Preset) -> Header:
    """Read the header of a preset.

    >>> read_header("demo").title
    "the whole pipeline in a few minutes on a laptop's CPU"
    """
    first, *lines = preset_text(name).splitlines()
    values: dict[str, str] = {"title": first.partition(": ")[2]}
    key = ""
    for line in lines:
        # A key stands right behind the sign of a comment; what is indented goes on with it. The
        # header ends where neither is the case.
        if start := re.match(r"# ([A-Z][a-z]+)  +(.*)", line):
            key = start[1].lower()
            values[key] = start[2]
        elif key and line.startswith("#   "):
            values[key] += " " + line.lstrip("# ")
        elif key:
            break
    return Header(**values)


def preset_list(width: int) -> str:
    """Return what `--preset list` prints, in lines of at most so many columns.

    >>> print("\\n".join(preset_list(72).splitlines()[:3]))
    demo      the whole pipeline in a few minutes on a laptop's CPU
              model     3 layers, 128 wide, 1.7 M parameters, of which 1.0 M
                        are embeddings
    """
    blocks = []
    for name in preset_names():
        header = read_header(name)
        lines = [f"{name:<10}{header.title}"]
        for key in KEYS[1:]:
            lines += textwrap.wrap(
                f"{key:<10}{vars(header)[key]}",
                width,
                initial_indent=" " * 10,
                subsequent_indent=" " * 20,
                break_on_hyphens=False,
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
