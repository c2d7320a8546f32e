"""Full disks, lost permissions, and death at every step of a save."""

import errno
import os
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tiny_checkpoint import (
    OTHER_RUN,
    RUN,
    make_checkpoint,
    same_tensors,
    save,
    save_tokenizer,
)

from annotated_mpnet.checkpoints import checkpoint as checkpoint_module
from annotated_mpnet.checkpoints.checkpoint import BEST, load_checkpoint, save_checkpoint
from annotated_mpnet.checkpoints.manifest import MANIFEST, verify_checkpoint
from annotated_mpnet.checkpoints.resume import newest_valid_checkpoint
from annotated_mpnet.checkpoints.retention import prune, recover
from annotated_mpnet.errors import CheckpointError, WriteError
from folders import tree
from processes import forked
from waiting import HUNG


class Recorder:
    """Replaces functions of `os`: records each call, then makes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self._opened: dict[int, str] = {}
        for name in ("open", "fsync", "rename"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *others: Any, **options: Any) -> Any:
            result = function(first, *others, **options)
            if name == "open":
                self._opened[result] = str(first)
            else:
                self.calls.append((name, Path(self._opened.get(first, first)).name))
            return result

        return call


def test_every_file_is_synced_before_the_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    path = save(tmp_path, 20)
    rename = recorder.calls.index(("rename", ".tmp-checkpoint20"))
    before, after = recorder.calls[:rename], recorder.calls[rename + 1 :]
    names = {Path(name).name for name in tree(path)} | {"tokenizer", ".tmp-checkpoint20"}
    assert before == [("fsync", name) for _, name in before]
    assert {name for _, name in before} == names
    # The list of names comes last. The order of the files does not matter, because nothing reads
    # them before the rename.
    assert before[-1] == ("fsync", ".tmp-checkpoint20")
    assert after == [("fsync", tmp_path.name)]


def test_the_temporary_directory_is_a_sibling_as_a_rename_needs(tmp_path: Path) -> None:
    seen = []

    def look(directory: Path) -> None:
        seen.append((directory.parent.parent, os.stat(directory).st_dev))

    save_checkpoint(tmp_path, "checkpoint20", make_checkpoint(20), look)
    assert seen == [(tmp_path, os.stat(tmp_path).st_dev)]


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    path = save(tmp_path, 20)
    for each in (path, *path.rglob("*")):
        everything = 0o777 if each.is_dir() else 0o666
        assert stat.S_IMODE(each.stat().st_mode) == everything & ~umask, each


def raising(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after(number: int) -> Callable[..., None]:
    """Return a `save_file` that writes that many bytes and then fails: the disk is full."""

    def save_file(tensors: object, path: Path) -> None:
        path.write_bytes(bytes(number))
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    return save_file


def fail_at(step: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Let the disk be full in one step of a save; return the `save_tokenizer` to use."""
    if step == "tokenizer":
        # tokenizers, written in Rust, raises a plain Exception.
        return raising(Exception("No space left on device (os error 28)"))
    if step.startswith("tensors"):
        monkeypatch.setattr(checkpoint_module, "save_file", full_after(int(step.split()[1])))
    elif step == "state":
        monkeypatch.setattr(Path, "write_text", raising(DISK_FULL))
    elif step == "manifest":
        monkeypatch.setattr(checkpoint_module, "write_manifest", raising(DISK_FULL))
    elif step == "mkdir":
        monkeypatch.setattr(Path, "mkdir", raising(DISK_FULL))
    elif step == "publish":
        monkeypatch.setattr(os, "rename", raising(DISK_FULL))
    return lambda directory: None


STEPS = ["mkdir", "tokenizer", "state", "tensors 0", "tensors 100", "manifest", "publish"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["checkpoint20", BEST])
def test_full_disk_leaves_earlier_checkpoints_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    save(tmp_path, 10)
    save(tmp_path, 10, BEST)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        failing = fail_at(step, patch)
        with pytest.raises(WriteError, match=r"No space left on device; needed 1 MB, free \d+ MB"):
            save_checkpoint(tmp_path, name, make_checkpoint(20), failing)
    assert tree(tmp_path) == before


def test_a_rename_that_fails_half_way_puts_the_previous_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10, BEST)
    before = tree(tmp_path)
    rename = os.rename

    def fail_to_publish(source: Path, target: Path) -> None:
        if source.name.startswith(".tmp-"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_to_publish)
    with pytest.raises(WriteError, match="not permitted"):
        save(tmp_path, 20, BEST)
    assert tree(tmp_path) == before


def test_a_write_that_the_system_truncates_is_a_write_error(tmp_path: Path) -> None:
    save(tmp_path, 10)
    before = tree(tmp_path)
    checkpoint = make_checkpoint(20)
    checkpoint.model_tensors["large"] = torch.zeros(50_000)  # type: ignore[index]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="File too large; needed 1 MB"):
            save_checkpoint(tmp_path, "checkpoint20", checkpoint, save_tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path) == before


def test_a_directory_that_disappeared_is_a_write_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save(run, 10)
    shutil.rmtree(run)
    with pytest.raises(WriteError, match="No such file or directory"):
        save(run, 20)
    assert not run.exists()


def test_a_bug_stays_a_bug_but_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, "checkpoint1", make_checkpoint(1), lambda path: print(1 // 0))
    assert list(tmp_path.iterdir()) == []


def test_best_checkpoint_is_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 10, BEST)
    save(tmp_path, 20, BEST)
    assert [path.name for path in tmp_path.iterdir()] == [BEST]
    assert same_tensors(load_checkpoint(tmp_path / BEST), make_checkpoint(20))


def test_a_checkpoint_that_was_moved_to_another_disk_is_replaced_where_its_link_is(
    tmp_path: Path,
) -> None:
    moved = save(tmp_path, 10, BEST).rename(tmp_path / "elsewhere")
    (tmp_path / BEST).symlink_to(moved)
    before = tree(moved)
    save(tmp_path, 20, BEST)
    save(tmp_path, 30, BEST)
    assert {path.name for path in tmp_path.iterdir()} == {BEST, "elsewhere"}
    assert same_tensors(load_checkpoint(tmp_path / BEST), make_checkpoint(30))
    assert tree(moved) == before


def test_another_runs_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    save(tmp_path, 20, run_id=OTHER_RUN)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"belongs to another run .* left unchanged"):
        save(tmp_path, 20)
    assert tree(tmp_path) == before


def test_what_may_not_be_ours_is_renamed_rather_than_replaced(tmp_path: Path) -> None:
    damaged = save(tmp_path, 20)
    (damaged / MANIFEST).write_bytes(b"")
    save(tmp_path, 20)
    shutil.rmtree(damaged)
    damaged.write_text("a file of the user's")
    save(tmp_path, 20)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint20", "checkpoint20.damaged", "checkpoint20.damaged2"]
    assert (tmp_path / "checkpoint20.damaged2").read_text() == "a file of the user's"
    verify_checkpoint(tmp_path / "checkpoint20")


STEPS_OF_THE_SYSTEM = ("mkdir", "fsync", "rename", "chmod", "unlink", "rmdir")


def die_at(number: int) -> None:
    """Kill this process before its n-th change of the disk."""
    count = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in STEPS_OF_THE_SYSTEM:
        setattr(os, name, wrap(getattr(os, name)))
    checkpoint_module.save_file = wrap(checkpoint_module.save_file)


def save_replace_and_prune(run: Path, acknowledged: Path) -> None:
    """Save a checkpoint, a best one, and one whose name is taken, as a run does."""
    with acknowledged.open("a") as file:
        for update, name in ((20, None), (20, BEST), (20, None)):
            path = save(run, update, name)
            file.write(f"{path.name} {update}\n")
            file.flush()
            prune(run, 1, RUN, protected={path.name})


def kill_at_every_step(root: Path) -> None:
    """Kill a process at each of these steps in turn, until one ends before."""
    for number in range(1, 1000):
        run, acknowledged = root / f"run{number}", root / f"acknowledged{number}"
        run.mkdir()
        save(run, 10)
        save(run, 10, BEST)
        acknowledged.write_text(f"checkpoint10 10\n{BEST} 10\n")
        child = os.fork()
        if child == 0:
            die_at(number)
            save_replace_and_prune(run, acknowledged)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        check_survival(run, acknowledged)
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status
    raise AssertionError("it never ended")


def check_survival(run: Path, acknowledged: Path) -> None:
    """Assert that after a restart every acknowledged checkpoint, or a newer one, is intact."""
    words = (line.split() for line in acknowledged.read_text().splitlines())
    updates = {name: int(update) for name, update in words}
    recover(run)
    found = newest_valid_checkpoint(run, RUN)
    assert found is not None
    assert found.warnings == []
    assert found.checkpoint.state.update >= max(updates.values())
    assert same_tensors(found.checkpoint, make_checkpoint(found.checkpoint.state.update))
    assert load_checkpoint(run / BEST).state.update >= updates[BEST]
    for path in run.iterdir():
        verify_checkpoint(path)


def test_sigkill_at_any_step_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    # In a new process, because forking this one with its threads would not be safe.
    process = forked(kill_at_every_step, tmp_path)
    process.join(HUNG)
    assert process.exitcode == 0
    assert len(list(tmp_path.glob("run*"))) > 61
