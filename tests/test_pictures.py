"""The pictures in the documentation are those that the code draws."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def drawing() -> ModuleType:
    specification = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(drawing().PICTURES))
def test_picture_is_up_to_date(name: str) -> None:
    assert drawing().PICTURES[name]() == (DOCS / name).read_text(encoding="utf-8")


def test_every_picture_is_drawn_or_measured() -> None:
    there = {path.name for path in DOCS.glob("*.svg")}
    assert there == {*drawing().PICTURES, "plateau.svg", "objectives.svg"}
