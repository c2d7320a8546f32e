"""What pyproject.toml promises about an installation is what the source needs."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pathspec import GitIgnoreSpec

from test_architecture import FILES, PACKAGE, SOURCE, imports_of

ROOT = Path(__file__).parent.parent
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = TOOLS["project"]
DEPENDENCIES = {Requirement(line).name for line in PROJECT["dependencies"]}
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["optional-dependencies"].items()
}
OPTIONAL = {each.name for name, lines in EXTRAS.items() if name != "dev" for each in lines}
DISTRIBUTIONS = {"yaml": "pyyaml", "torch.utils.tensorboard": "tensorboard"}
"""What is imported -> what is installed, where the names differ."""


def distributions_of(tree: ast.AST) -> Iterator[str]:
    """Yield what has to be installed for all imports of a file."""
    for name in imports_of(tree):
        root = name.partition(".")[0]
        if root in sys.stdlib_module_names or root == PACKAGE:
            continue
        found = [each for each in DISTRIBUTIONS if f"{name}.".startswith(f"{each}.")]
        yield DISTRIBUTIONS[found[0]] if found else canonicalize_name(root)


def without_functions(tree: ast.Module) -> ast.Module:
    """Leave only what runs when a module is imported."""

    class Remover(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

    return Remover().visit(tree)


def imported(*, at_once: bool = False) -> set[str]:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    return {
        name
        for tree in trees
        for name in distributions_of(without_functions(tree) if at_once else tree)
    }


def test_what_is_imported_is_what_is_declared() -> None:
    # PyTorch for CUDA brings its own Triton; without one, `--attention triton` is refused.
    assert imported() == DEPENDENCIES | OPTIONAL | {"triton"}


def test_extras_are_imported_only_where_they_are_used() -> None:
    assert not OPTIONAL & imported(at_once=True)


def test_dev_holds_the_other_extras() -> None:
    (own,) = [each for each in EXTRAS["dev"] if each.name == PROJECT["name"]]
    assert own.extras == EXTRAS.keys() - {"dev"}


def test_constraints_pin_what_is_declared_at_or_above_its_lower_bound() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    declared = [*map(Requirement, PROJECT["dependencies"]), *chain(*EXTRAS.values())]
    for each in declared:
        if each.name == PROJECT["name"]:
            continue
        (bound,) = each.specifier
        assert bound.operator == ">=", f"{each}: tests/lowest_versions.py needs a lower bound"
        assert pinned[canonicalize_name(each.name)] in each.specifier, each


def test_the_readme_names_each_extra_and_the_oldest_python() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Install it")[2].partition("\n## ")[0]
    for extra in EXTRAS:
        assert f"`{extra}`" in section, extra
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer" in section
    assert re.fullmatch(r"3\.\d+", oldest)


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_each_command_has_a_function(command: str) -> None:
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_wheel_holds_all_files_of_the_package() -> None:
    # hatchling packs this folder, all but what `.gitignore` names.
    assert TOOLS["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": [f"src/{PACKAGE}"]}
    ignored = GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text("utf-8").splitlines())
    found = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    files = {path.as_posix() for path in found if "__pycache__" not in path.parts}
    assert not [file for file in files if ignored.match_file(f"src/{PACKAGE}/{file}")]
    assert files >= {"explain/page.html", "settings/presets/demo.toml", "py.typed"}
