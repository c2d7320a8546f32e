"""The pictures in the documentation are those that the code draws."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(("form", "name"), [("natural", "two_streams"), ("permuted", "permuted")])
def test_the_picture_is_up_to_date(form: str, name: str) -> None:
    drawing = runpy.run_path(str(DOCS / "draw_two_streams.py"))["drawing"]
    assert drawing(form) == (DOCS / f"{name}.svg").read_text(encoding="utf-8")
