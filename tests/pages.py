"""Doctests in Markdown pages: blocks of ```pycon, one section after the other."""

import doctest
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def sections(page: str) -> list[str]:
    """Return the headings of a page's sections."""
    return re.findall(r"^## (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.M)


def run_section(page: str, heading: str) -> None:
    """Run a section's examples, after those of the sections before it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.M)[1:]
    names: dict[str, object] = {"__name__": "page"}
    for part in parts:
        title = part.partition("\n")[0]
        source = "\n".join(re.findall(r"^```pycon\n(.*?)^```", part, re.M | re.S))
        test = doctest.DocTestParser().get_doctest(source, names, title, page, 0)
        told: list[str] = []
        failed = doctest.DocTestRunner().run(test, out=told.append, clear_globs=False).failed
        assert not failed, "".join(told)
        names = test.globs
        if title == heading:
            return
    raise AssertionError(f"{page} has no section {heading!r}")
