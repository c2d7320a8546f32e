"""The pictures in the documentation are those that the code draws."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    ("form", "name"), [([], "two_streams.svg"), (["permuted"], "permuted.svg")]
)
def test_the_picture_is_up_to_date(form: list[str], name: str) -> None:
    command = [sys.executable, str(DOCS / "draw_two_streams.py"), *form]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True)
    assert drawn.stdout == (DOCS / name).read_text(encoding="utf-8")
