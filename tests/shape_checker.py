"""Checks shape suffixes in all tests: the shape of `hidden_BLD` must match its name.

A wrong suffix is worse than none, because readers trust it. So while a test runs, the checker looks
at the local variables of each function of `mpnet/` and `fast/` when it returns. A tensor or array
whose name ends in `_` and capital letters must have

- as many dimensions as the suffix has characters,
- size 1 where the suffix has a `1`,
- the same size for the same letter within one call of a function.

Errors are collected and raised at the end of the test, because an error raised inside a profile
function could be swallowed by any `except`. Only the last value of each name is checked.
"""

import re
import sys
import threading
from types import CodeType, FrameType, TracebackType
from typing import Self

import numpy as np
import torch

CHECKED_FOLDERS = ("annotated_mpnet/mpnet/", "annotated_mpnet/fast/")
SUFFIX = re.compile(r"_([A-Z1]+)$")


class ShapeChecker:
    """Watches function returns in a `with` block, in this thread and those it starts."""

    def __init__(self, folders: tuple[str, ...] = CHECKED_FOLDERS) -> None:
        self.lies: list[str] = []
        self._folders = folders
        self._suffixes: dict[CodeType, dict[str, str]] = {}
        self._profiler_before: object = None

    def __enter__(self) -> Self:
        self._profiler_before = sys.getprofile()
        threading.setprofile(self._watch)
        sys.setprofile(self._watch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.setprofile(self._profiler_before)  # type: ignore[arg-type]
        threading.setprofile(None)

    def raise_lies(self) -> None:
        """Raise an `AssertionError` that names each wrong suffix once."""
        if self.lies:
            raise AssertionError("\n".join(dict.fromkeys(self.lies)))

    def _watch(self, frame: FrameType, event: str, _: object) -> None:
        if event != "return":
            return
        # This runs at every return of every function of every library, so it must be one look-up.
        code = frame.f_code
        suffixes = self._suffixes.get(code)
        if suffixes is None:
            suffixes = self._suffixes[code] = self._suffixes_of(code)
        if suffixes:
            self.lies += lies_in(code.co_qualname, frame.f_locals, suffixes)

    def _suffixes_of(self, code: CodeType) -> dict[str, str]:
        filename = code.co_filename.replace("\\", "/")
        if not any(folder in filename for folder in self._folders):
            return {}
        # Check variables that an inner function also reads (cells) only in the outer function.
        names = (*code.co_varnames, *code.co_cellvars)
        found = {name: SUFFIX.search(name) for name in names}
        return {name: match[1] for name, match in found.items() if match}


def lies_in(function: str, variables: dict[str, object], suffixes: dict[str, str]) -> list[str]:
    """Return a sentence for each variable whose shape does not match its suffix."""
    lies = []
    sizes: dict[str, tuple[int, str]] = {"1": (1, "its name")}
    for name, suffix in suffixes.items():
        value = variables.get(name)
        if not isinstance(value, torch.Tensor | np.ndarray):
            continue
        shape = tuple(value.shape)
        if len(shape) != len(suffix):
            lies.append(f"{function}: {name} has shape {shape}, not {len(suffix)} dimensions")
            continue
        for letter, size in zip(suffix, shape, strict=True):
            expected, witness = sizes.setdefault(letter, (size, name))
            if size != expected:
                lies.append(
                    f"{function}: {name} has shape {shape}: {letter} is {size} here, "
                    f"and {expected} by {witness}"
                )
    return lies
