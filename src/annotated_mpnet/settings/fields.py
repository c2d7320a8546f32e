"""What is written about a setting, read from where it is written.

A setting is one field of a dataclass in `settings/config.py` or `settings/commands.py`, with a docstring under it.
Four readers want to show it: the parser, `--help`, `--print-config`, and the reference in `docs/`.
None of them may say it in words of its own, or the four would drift apart:

    encoder_layers: int = option(12, at_least=1, at_most=1000)        config.py
    \"""Transformer layers. MPNet-base has 12. ...\"""
          |
          v
    Setting(name="encoder_layers", kind="INT", default=12, range="1 to 1000", help="...")
          |
          +-->  --encoder-layers INT    Transformer layers. ... (default: 12; 1 to 1000)
          +-->  # Transformer layers. ... / encoder_layers = 12       --print-config
          +-->  #### `--encoder-layers` INT ...                       docs/configuration.md

>>> from annotated_mpnet.mpnet.config import ArchitectureConfig
>>> from annotated_mpnet.settings.config import DataConfig
>>> layers = settings_of(ArchitectureConfig)[0]
>>> layers.name, layers.kind, layers.default, layers.range
('encoder_layers', 'INT', 12, '1 to 1000')
>>> layers.help
'Transformer layers. MPNet-base has 12. Time and memory grow in proportion.'

Python throws the docstring of a field away when it compiles it (only those of modules, classes and
functions are kept), so it is read from the source once more. It is written in lines of 100 columns
there; who shows it breaks it anew, because a help text that is broken twice is ragged.

Next: `settings/commands.py`, for the fields that are not in `settings/config.py`.
"""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from annotated_mpnet.mpnet.config import flag

KINDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
"""What stands for a value in help texts, by its type."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field as its reader sees it.

    Attributes:
        name: of the field, and of the key in a configuration file.
        kind: what stands for the value, as in `--lr FLOAT`; empty for yes or no.
        optional: whether it may be left unset; its default is None then.
        default: what holds when nobody says anything.
        range: of a number; empty without one.
        aliases: other spellings of the flag.
        help: the docstring as one paragraph: what, why, unit.
    """

    name: str
    kind: str
    optional: bool
    default: object
    range: str
    aliases: tuple[str, ...]
    help: str

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return flag(self.name)

    @property
    def hint(self) -> str:
        """What a reader wants to know at a glance: default, range, other spellings.

        >>> from annotated_mpnet.mpnet.config import OptimizationConfig
        >>> from annotated_mpnet.settings.config import RunConfig
        >>> [each.hint for each in settings_of(OptimizationConfig)[:2]]
        ['default: 16; 1 to 1048576', 'default: 8; 1 to 1048576; also -gc_steps']
        >>> settings_of(RunConfig)[0].hint
        'default: checkpoints'
        """
        parts = [f"default: {self.shown_default}"] if self.shown_default else []
        parts += [self.range] if self.range else []
        parts += [f"also {', '.join(self.aliases)}"] if self.aliases else []
        return "; ".join(parts)

    @property
    def shown_default(self) -> str:
        """The default in words; empty where the help has said it, or there is none."""
        if self.default is dataclasses.MISSING:
            return ""
        if self.default is None:
            # What unset means is a sentence (`10 % of --total-updates`), and belongs to the help.
            return "" if "Default: " in self.help else "none"
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return str(self.default) or "empty"

    @property
    def expected(self) -> str:
        """What a message says of the value: of which kind, and in which range.

        >>> from annotated_mpnet.mpnet.config import ArchitectureConfig
        >>> settings = {each.name: each for each in settings_of(ArchitectureConfig)}
        >>> [settings[name].expected for name in ("dropout", "position_embedding")]
        ['a number, 0 to <1', 'one of learned, sinusoidal']
        """
        if self.kind.startswith("{"):
            return f"one of {self.kind[1:-1].replace(',', ', ')}"
        kinds = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "TEXT": "a text"}
        return kinds.get(self.kind, "no value") + (f", {self.range}" if self.range else "")


def all_settings(kind: type) -> Iterator[Setting]:
    """Yield the settings of a dataclass, and of the groups in it, and of the groups in those.

    >>> from annotated_mpnet.settings.config import PretrainingConfig
    >>> [each.name for each in all_settings(PretrainingConfig)][-1]
    'wandb_watch'
    """
    yield from settings_of(kind)
    for each in dataclasses.fields(kind):
        if isinstance(each.default_factory, type):
            yield from all_settings(each.default_factory)


def settings_of(group: type) -> list[Setting]:
    """Return the settings of a dataclass, in its order; fields that are groups are left out."""
    texts = _field_texts(group.__module__)[group.__name__]
    return [
        Setting(
            name=each.name,
            kind=_kind(each.type),
            optional=NoneType in get_args(each.type),
            default=each.default,
            range=_range(each.metadata.get("bounds", {})),
            aliases=each.metadata.get("aliases", ()),
            help=texts[each.name],
        )
        for each in dataclasses.fields(group)
        if each.name in texts
    ]


def one_paragraph(text: str | None) -> str:
    """Undo the line breaks of a docstring.

    >>> one_paragraph("Peak learning rate,\\n    reached at the end of the warm-up.")
    'Peak learning rate, reached at the end of the warm-up.'
    """
    return " ".join((text or "").split())


def _kind(type_: Any) -> str:
    """Return what stands for a value of a type.

    >>> from typing import Literal
    >>> [_kind(each) for each in (int, Path | None, Literal["learned", "sinusoidal"], bool)]
    ['INT', 'PATH', '{learned,sinusoidal}', '']
    """
    if type_ is bool:
        return ""
    if type_ in KINDS:
        return KINDS[type_]
    # What is left has parts: the choices of a Literal, or a type that may be unset too.
    parts = [part for part in get_args(type_) if part not in (NoneType, Ellipsis)]
    if all(isinstance(part, str) for part in parts):
        return "{" + ",".join(parts) + "}"
    return _kind(parts[0])


def _range(bounds: Mapping[str, float]) -> str:
    """Write a range as help texts show it: short, and without blanks where a line may not break.

    >>> _range({">=": 1, "<=": 1000}), _range({">": 0, "<": 1}), _range({">=": 5}), _range({})
    ('1 to 1000', '>0 to <1', '>=5', '')
    """
    low = next((f"{sign}{bound}" for sign, bound in bounds.items() if sign[0] == ">"), "")
    high = next((f"{sign}{bound}" for sign, bound in bounds.items() if sign[0] == "<"), "")
    if not low or not high:
        return low or high
    return f"{low.removeprefix('>=')} to {high.removeprefix('<=')}"


@cache
def _field_texts(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of the fields of all classes of a module: class, field, text.

    >>> _field_texts("annotated_mpnet.settings.config")["RunConfig"]["checkpoint_dir"]
    "The run's directory: configuration, metrics, checkpoints, export. One run a directory."
    """
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {each.name: dict(_texts_in(each)) for each in classes}


def _texts_in(node: ast.ClassDef) -> list[tuple[str, str]]:
    # A docstring of a field is a string that stands alone, right behind the field.
    pairs = zip(node.body, node.body[1:], strict=False)
    return [
        (field.target.id, one_paragraph(text.value.value))
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    ]
