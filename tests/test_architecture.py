"""The house: which room may import which, and what the source must not contain.

Imports are read from the source, including those inside functions: a late import is still a
dependency. `MAY_IMPORT` is ordered from the ground up, so there are no cycles.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import annotated_mpnet

PACKAGE = "annotated_mpnet"
SOURCE = Path(annotated_mpnet.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

MAY_IMPORT = {
    "mpnet": set(),
    "errors": set(),
    "files": {"errors"},
    "signals": {"errors"},
    "fast": {"mpnet", "errors"},
    "settings": {"mpnet", "errors"},
    "text": {"mpnet", "errors", "files", "settings", "signals"},
    "streams": {"mpnet", "errors", "settings", "text"},
    "training": {"mpnet", "errors", "settings", "text", "streams", "fast", "signals"},
    "checkpoints": {"mpnet", "errors", "files", "settings", "streams", "training"},
    "tracking": {"mpnet", "errors", "files", "settings", "training", "checkpoints"},
    "conversion": {"mpnet", "errors", "files", "settings", "text", "checkpoints"},
    "runs": {
        "mpnet",
        "errors",
        "files",
        "signals",
        "fast",
        "settings",
        "text",
        "streams",
        "training",
        "checkpoints",
        "tracking",
        "conversion",
    },
    "demo": {
        "mpnet",
        "errors",
        "files",
        "settings",
        "text",
        "training",
        "checkpoints",
        "conversion",
        "runs",
    },
    "explain": {"mpnet", "errors", "files", "settings", "text", "conversion"},
    "cli": {"errors", "signals", "settings", "text", "conversion", "runs", "demo", "explain"},
    "__main__": {"cli"},
    # The public names, imported at their first use.
    "package": {"mpnet", "text", "conversion"},
    # Modules that users of annotated-mpnet import.
    "modeling": {"mpnet"},
    "data": {"mpnet"},
}
# The third-party packages that a room may use, where that is part of its promise.
MAY_USE: dict[str, set[str]] = {
    "mpnet": {"torch", "numpy"},
    "fast": {"torch", "triton"},
    "errors": set(),
    "signals": set(),
}


def part_of(module: str) -> str:
    """Return the room of `annotated_mpnet.a.b`: `a`."""
    names = module.split(".")
    if names[0] != PACKAGE:
        raise ValueError(f"{module} is not ours")
    if len(names) == 1:
        return "package"
    return names[1]


def module_of(file: Path) -> str:
    names = (PACKAGE, *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of every import, anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would escape this test; write the full name"
            assert node.module is not None
            # Include the names, which may be modules: `from annotated_mpnet import data`.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_in(file: Path) -> list[str]:
    return list(imports_of(ast.parse(file.read_text(encoding="utf-8"))))


def name_of(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def test_a_room_may_import_only_rooms_below_it() -> None:
    rooms = list(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        assert allowed <= set(rooms[: rooms.index(room)]), f"{room} would close a circle"


def test_the_root_holds_at_most_seven_files() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= 7


every_file = pytest.mark.parametrize("file", FILES, ids=name_of)


@every_file
def test_dependencies_point_one_way(file: Path) -> None:
    part = part_of(module_of(file))
    assert part in MAY_IMPORT, f"{name_of(file)} belongs to no floor; give it one in this test"
    ours = [name for name in imports_in(file) if name.split(".")[0] == PACKAGE]
    allowed = MAY_IMPORT[part] | {part}
    upwards = [name for name in ours if part_of(name) not in allowed]
    assert not upwards, f"{name_of(file)} ({part}) must not import {upwards}"


@every_file
def test_a_part_uses_no_other_package_than_it_promises(file: Path) -> None:
    module = module_of(file)
    names = module.split(".")
    promise = MAY_USE.get(names[1]) if len(names) > 1 else set()
    if promise is None:
        return
    packages = {name.split(".")[0] for name in imports_in(file)}
    foreign = packages - sys.stdlib_module_names - {PACKAGE}
    assert foreign <= promise, f"{name_of(file)} must not import {foreign - promise}"


def test_one_file_alone_imports_torch_distributed() -> None:
    importers = [name_of(f) for f in FILES if "torch.distributed" in ".".join(imports_in(f))]
    assert set(importers) <= {"training/distributed.py"}


def test_every_floor_has_files() -> None:
    # If the package were not found, the tests above would all pass.
    assert {"mpnet", "runs"} <= {part_of(module_of(file)) for file in FILES}


@pytest.mark.parametrize("module", ["cli", "settings.config"])
def test_help_waits_for_no_torch(module: str) -> None:
    heavy = "torch", "transformers", "datasets", "pyarrow"
    program = (
        f"import sys, {PACKAGE}.{module}; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# Forbidden in the source: each of these can run foreign code.


def dangers_of(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that code reading foreign files must not make."""
    forbidden_arguments = {
        "weights_only=False",
        "trust_remote_code=True",
        "shell=True",
        "allow_pickle=True",
    }
    pickles = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    yield from (f"import {n}" for n in imports_of(tree) if n.split(".")[0] in pickles)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
            yield f"{called}("
        for keyword in node.keywords:
            argument = f"{keyword.arg}={ast.unparse(keyword.value)}"
            if argument in forbidden_arguments:
                yield argument


@every_file
def test_source_runs_no_foreign_code(file: Path) -> None:
    assert not list(dangers_of(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "def f():\n    import pickle\n    pickle.load(file)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "yaml.load(file)",
    ],
)
def test_scan_finds_what_it_looks_for(source: str) -> None:
    assert list(dangers_of(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(file)",
        "'''Never pickle.load( or eval( anything: weights_only=False'''",
    ],
)
def test_scan_lets_harmless_code_pass(source: str) -> None:
    assert not list(dangers_of(ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import annotated_mpnet.data.packing as p", "annotated_mpnet.data.packing"),
        ("from annotated_mpnet import data", "annotated_mpnet.data"),
        ("from annotated_mpnet.data import packing", "annotated_mpnet.data.packing"),
        ("def f():\n    from annotated_mpnet.cli import x", "annotated_mpnet.cli.x"),
        ("from torch import distributed", "torch.distributed"),
    ],
)
def test_imports_are_found_however_they_are_written(source: str, name: str) -> None:
    assert list(imports_of(ast.parse(source))) == [name]


@every_file
def test_triton_is_imported_only_when_kernels_are_asked_for(file: Path) -> None:
    # It exists for Linux only.
    if file.name == "triton_kernels.py":
        return
    assert not any(name.split(".")[0] == "triton" for name in imports_in(file))
    body = ast.parse(file.read_text(encoding="utf-8")).body
    at_the_top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("triton_kernels" in name for name in imports_of(ast.Module(at_the_top, [])))
