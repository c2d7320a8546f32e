"""Count code and annotation: `python tests/count_lines.py src/annotated_mpnet`.

Code is all lines except blank lines, comment lines and docstrings. Annotation is docstrings and
full-line comments, without blank lines.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    """Yield every string that is a statement: docstrings, including those of attributes."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node


def count(file: Path) -> tuple[int, int, int]:
    """Return (code lines, annotation lines, words) of a file."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()}
    comments = {number for number, line in enumerate(lines, 1) if line.strip().startswith("#")}
    strings = {
        number
        for node in docstrings(ast.parse(text))
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    annotation = (comments | strings) - blank
    code = len(lines) - len(blank | annotation)
    return code, len(annotation), len(text.split())


def main(places: list[str]) -> None:
    """Print a line for each file and folder, and the sum."""
    files = [
        file
        for place in map(Path, places)
        for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))
    ]
    folders: dict[Path, list[int]] = {}
    print(f"{'code':>6} {'notes':>6} {'words':>7}")
    for file in files:
        counted = count(file)
        print("{:6} {:6} {:7}  {}".format(*counted, file))
        total = folders.setdefault(file.parent, [0, 0, 0])
        folders[file.parent] = [a + b for a, b in zip(total, counted, strict=True)]
    for folder, total in folders.items():
        print("{:6} {:6} {:7}  {}/".format(*total, folder))
    print("{:6} {:6} {:7}  all".format(*map(sum, zip(*folders.values(), strict=True))))


if __name__ == "__main__":
    main(sys.argv[1:] or ["src/annotated_mpnet"])
