"""Each step of docs/permutation.md, run as written."""

import pytest

from pages import run_section, sections

PAGE = "permutation.md"


@pytest.mark.parametrize("heading", sections(PAGE))
def test_step(heading: str) -> None:
    run_section(PAGE, heading)
