"""All tests named in docs/reliability.md exist."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| (\d+) \| (.+) \| (.+) \| (.+) \|")


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_fault_matrix_has_a_test() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [found.groups() for line in page.splitlines() if (found := ROW.fullmatch(line))]
    assert [int(number) for number, *_ in rows] == list(range(1, 83))
    for number, _, _, named in rows:
        tests = re.findall(r"`([\w/]+\.py)::(test_\w+)`", named)
        assert tests, number
        for file, name in tests:
            assert name in names_in(file), (number, file, name)
