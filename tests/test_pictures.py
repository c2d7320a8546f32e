"""The pictures in the documentation are those that the code draws."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_two_streams_picture_is_up_to_date() -> None:
    drawn = subprocess.run(
        [sys.executable, DOCS / "draw_two_streams.py"], capture_output=True, text=True, check=True
    )
    assert drawn.stdout == (DOCS / "two_streams.svg").read_text(encoding="utf-8")
