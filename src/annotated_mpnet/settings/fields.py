"""What is known about a setting: its type, default, range and help, read from its dataclass.

The parser, `--help`, `--print-config` and `docs/configuration.md` all show settings. They all get
them from here, so they cannot disagree.

>>> from annotated_mpnet.mpnet.config import ArchitectureConfig
>>> layers = settings_of(ArchitectureConfig)[0]
>>> layers.name, layers.flag, layers.kind, layers.default, layers.range
('encoder_layers', '--encoder-layers', 'INT', 12, '1 to 1000')

Python does not keep the docstring of a field, so the help is read from the source.
"""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from annotated_mpnet.mpnet.config import flag

KINDS = {
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "a text"),
    Path: ("PATH", "a path"),
}
"""The placeholder for a value in help texts, and the words for it in messages."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a dataclass as a user sees it."""

    name: str
    group: str
    """The table that it is in; empty for one of the command itself."""
    type: Any
    """Makes a value of a text: `int`, `Path`, ...; `str` where there are choices."""
    choices: tuple[str, ...]
    optional: bool
    several: bool
    """Whether it takes more than one value."""
    default: object
    range: str
    aliases: tuple[str, ...]
    help: str

    @property
    def is_positional(self) -> bool:
        """Whether it is given without a flag."""
        return self.name in ("files", "sentence")

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return self.name.upper() if self.is_positional else flag(self.name)

    @property
    def kind(self) -> str:
        """The placeholder for a value, as in `--lr FLOAT`; empty for yes or no."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return "" if self.type is bool else KINDS[self.type][0]

    @property
    def hint(self) -> str:
        """Default, range and other spellings, to see at a glance.

        >>> from annotated_mpnet.mpnet.config import OptimizationConfig
        >>> [each.hint for each in settings_of(OptimizationConfig)[:2]]
        ['default: 16; 1 to 1048576', 'default: 8; 1 to 1048576; also -gc_steps']
        """
        parts = [f"default: {self._shown_default}"] if self._shown_default else []
        parts += [self.range] if self.range else []
        parts += [f"also {', '.join(self.aliases)}"] if self.aliases else []
        return "; ".join(parts)

    @property
    def _shown_default(self) -> str:
        if self.default in (dataclasses.MISSING, ()):
            return ""
        if self.default is None:
            # Some help texts explain what unset means (`Default: 10 % of --total-updates`).
            return "" if "Default: " in self.help else "none"
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return str(self.default) or "empty"

    @property
    def expected(self) -> str:
        """What an error message says of the value.

        >>> from annotated_mpnet.mpnet.config import ArchitectureConfig
        >>> settings = {each.name: each for each in settings_of(ArchitectureConfig)}
        >>> [settings[name].expected for name in ("dropout", "position_embedding")]
        ['a number, 0 to <1', 'one of learned, sinusoidal']
        """
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.type is bool:
            return f"no value, only {self.flag} or {flag(f'no-{self.name}')}"
        return KINDS[self.type][1] + (f", {self.range}" if self.range else "")


def all_settings(kind: type, group: str = "") -> Iterator[Setting]:
    """Yield the settings of a dataclass and of all groups in it."""
    yield from settings_of(kind, group)
    for name, each in groups_of(kind).items():
        yield from all_settings(each, name)


def groups_of(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass that are dataclasses themselves, with their types."""
    factories = {each.name: each.default_factory for each in dataclasses.fields(kind)}
    return {name: group for name, group in factories.items() if isinstance(group, type)}


def settings_of(kind: type, group: str = "") -> list[Setting]:
    """Return the settings of a dataclass in its order, without the groups in it."""
    texts = _field_texts(kind.__module__)[kind.__name__]
    return [
        Setting(
            name=each.name,
            group=group,
            type=next((type_ for type_ in _types(each.type) if isinstance(type_, type)), str),
            choices=tuple(choice for choice in _types(each.type) if isinstance(choice, str)),
            optional=NoneType in get_args(each.type),
            several=any(get_origin(type_) is tuple for type_ in _alternatives(each.type)),
            default=each.default,
            range=_range(each.metadata.get("bounds", {})),
            aliases=each.metadata.get("aliases", ()),
            help=texts[each.name],
        )
        for each in dataclasses.fields(kind)
        if each.name in texts
    ]


def one_paragraph(text: str | None) -> str:
    """Undo the line breaks of a docstring."""
    return " ".join((text or "").split())


def _alternatives(type_: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(type_) if isinstance(type_, UnionType) else (type_,)


def _types(type_: Any) -> list[Any]:
    """Return the types and choices that a type is made of.

    >>> from typing import Literal
    >>> _types(int), _types(Path | None), _types(Literal["a", "b"] | None), _types(tuple[Path, ...])
    ([<class 'int'>], [<class 'pathlib.Path'>], ['a', 'b'], [<class 'pathlib.Path'>])
    """
    if type_ in (NoneType, ...):
        return []
    parts = get_args(type_)
    return [each for part in parts for each in _types(part)] if parts else [type_]


def _range(bounds: dict[str, float]) -> str:
    """Write a range in a few characters.

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
    """Return the docstrings of the fields of all classes in a module: class -> field -> text."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        node.name: {
            field.target.id: one_paragraph(text.value.value)
            for field, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
