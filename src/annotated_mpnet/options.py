"""A setting as a field of a dataclass: its range, its flag, its other spellings.

A dataclass knows a field's name, type and default. What a setting needs beyond that, a range and
the spellings of other programs, goes into the field's `metadata`, so that one line holds all of it,
and the docstring under it is its help:

>>> @dataclasses.dataclass(frozen=True)
... class Example:
...     weight_decay: float = option(0.01, at_least=0, at_most=1, aliases=("-wd",))
>>> check_ranges(Example())
>>> check_ranges(Example(weight_decay=-1.0))
Traceback (most recent call last):
annotated_mpnet.errors.ConfigError: --weight-decay is -1.0; expected a number >= 0 and <= 1

Next: `config.py`, which declares all settings by it.
"""

import dataclasses
import math
import operator
from typing import Any, TypeVar

from annotated_mpnet.errors import ConfigError

T = TypeVar("T")


def option(
    default: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    aliases: tuple[str, ...] = (),
) -> T:
    """Declare a field with its range and the other spellings of its flag.

    `at_least` and `at_most` belong to the range, `above` and `below` do not. A range also excludes
    `nan` and the infinities. The outer bounds of counts are generous: they are there to catch a
    number with some zeros too many, before it asks for a terabyte.

    The type of the default is returned, though what comes back is a dataclass field: so says
    `dataclasses.field` itself, and so a type checker still sees `lr: float = option("x")`.
    """
    bounds = {">=": at_least, ">": above, "<=": at_most, "<": below}
    given = {sign: bound for sign, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"bounds": given, "aliases": aliases})


def flag(name: str) -> str:
    """Return the spelling of a field on the command line.

    >>> flag("encoder_ffn_dim")
    '--encoder-ffn-dim'
    """
    return "--" + name.replace("_", "-")


def check_ranges(group: Any) -> None:
    """Raise a `ConfigError` for a field of a group of settings that is outside its range.

    The first one, in the order of the fields: one clear line is easier to mend than a list.
    """
    for each in dataclasses.fields(group):
        value = getattr(group, each.name)
        bounds = each.metadata.get("bounds", {})
        if isinstance(value, int | float) and bounds and not _within(value, bounds):
            wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
            raise ConfigError(f"{flag(each.name)} is {value}; expected a number {wanted}")


def _within(value: float, bounds: dict[str, float]) -> bool:
    """Return whether a number keeps all bounds of its range.

    >>> [_within(value, {">": 0, "<=": 1}) for value in (0, 0.5, 1, math.nan)]
    [False, True, True, False]
    """
    compare = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
    return math.isfinite(value) and all(compare[sign](value, b) for sign, b in bounds.items())
