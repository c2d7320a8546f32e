"""Which process may use a run's directory, and what happens to the files in it."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoint import OTHER_RUN, save

from annotated_mpnet.checkpoints.checkpoint import BEST
from annotated_mpnet.checkpoints.run_directory import (
    ENVIRONMENT,
    LOCK,
    RunDirectory,
    find_start,
    holds_run,
    refuse_taken_directory,
)
from annotated_mpnet.errors import CheckpointError, WriteError
from folders import tree


def finish_run(path: Path) -> str:
    """Write the files of a finished run; return its id."""
    with RunDirectory(path) as directory:
        for name in ("config.toml", "log.txt", "report.md"):
            directory.write(name, "text\n")
        directory.write("metrics.jsonl", '{"step": 10}\n')
        save(path, 10, run_id=directory.run_id)
        save(path, 10, BEST, run_id=directory.run_id)
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text("{}")
        return directory.run_id


def test_a_fresh_directory_gets_an_id_and_says_what_it_runs_on(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a" / "b") as directory:
        environment = json.loads((tmp_path / "a" / "b" / ENVIRONMENT).read_text())
    assert environment["run_id"] == directory.run_id
    assert len(directory.run_id) == 32
    assert {"python", "torch", "datasets"} <= environment["libraries"].keys()
    assert environment["machine"]["processors"] == os.cpu_count()


def test_no_environment_variable_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-in-the-mine")
    with RunDirectory(tmp_path):
        assert all(b"canary" not in content for content in tree(tmp_path).values())


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_second_run_is_refused_and_nothing_touched(tmp_path: Path, has_lock: bool) -> None:
    finish_run(tmp_path)
    if not has_lock:
        (tmp_path / LOCK).unlink()
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"--resume, .*--overwrite"):
            RunDirectory(tmp_path).__enter__()
        with pytest.raises(CheckpointError, match=r"--resume, .*--overwrite"):
            refuse_taken_directory(tmp_path, resume=False, overwrite=False)
    assert tree(tmp_path) == before


def test_a_resume_keeps_the_id_and_changes_no_file(tmp_path: Path) -> None:
    run_id = finish_run(tmp_path)
    before = tree(tmp_path)
    refuse_taken_directory(tmp_path, resume=True, overwrite=False)
    with RunDirectory(tmp_path, resume=True) as directory:
        assert directory.run_id == run_id
    assert tree(tmp_path) == before


def test_a_resume_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    finish_run(tmp_path)
    (tmp_path / ".tmp-checkpoint20").mkdir()
    os.rename(tmp_path / BEST, tmp_path / f".old-{BEST}")
    with RunDirectory(tmp_path, resume=True):
        assert (tmp_path / BEST).is_dir()
        assert not (tmp_path / ".tmp-checkpoint20").exists()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    previous = finish_run(tmp_path)
    foreign = save(tmp_path, 99999999, run_id=OTHER_RUN)
    user = [tmp_path / name for name in ("checkpoint_old.bak", "best.txt", "corpus.txt")]
    for path in user:
        path.write_text("mine")
    before = tree(foreign)
    refuse_taken_directory(tmp_path, resume=False, overwrite=True)
    with RunDirectory(tmp_path, overwrite=True) as directory:
        assert directory.run_id != previous
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {ENVIRONMENT, LOCK, foreign.name, *(path.name for path in user)}
    assert tree(foreign) == before


def test_overwrite_deletes_nothing_without_proof_that_a_run_was_there(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("of another program")
    with pytest.raises(CheckpointError, match="nothing was deleted"):
        RunDirectory(tmp_path, overwrite=True).__enter__()
    assert (tmp_path / "config.toml").read_text() == "of another program"


def test_files_of_our_names_without_an_id_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("of another program")
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunDirectory(tmp_path).__enter__()


def test_files_with_other_names_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / ".tmp-mine").write_text("text")
    with RunDirectory(tmp_path):
        assert (tmp_path / "corpus.txt").read_text() == "text"
        assert (tmp_path / ".tmp-mine").read_text() == "text"


def test_an_aborted_start_does_not_count_as_a_run(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        directory.write("log.txt", "no text found\n")
    assert not holds_run(tmp_path)
    with RunDirectory(tmp_path):
        pass


def test_a_restart_replaces_a_run_without_results_and_no_other(tmp_path: Path) -> None:
    assert find_start(tmp_path / "nowhere") == find_start(tmp_path) == "start"
    (tmp_path / "notes.txt").write_text("mine")
    assert find_start(tmp_path) == "start"
    with RunDirectory(tmp_path) as directory:
        directory.write("metrics.jsonl", '{"step": 1}\n')
    assert find_start(tmp_path) == "restart"
    # A process that was still ending did save.
    save(tmp_path, 10, run_id=directory.run_id)
    assert find_start(tmp_path) == "resume"
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunDirectory(tmp_path, restart=True).__enter__()
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "checkpoint10")
    with RunDirectory(tmp_path, restart=True) as again:
        assert again.run_id != directory.run_id
    assert {path.name for path in tmp_path.iterdir()} == {ENVIRONMENT, LOCK, "notes.txt"}


def test_files_of_our_names_without_an_id_are_neither_resumed_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("of another program")
    with pytest.raises(CheckpointError, match=f"no {ENVIRONMENT}"):
        find_start(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"run_id": 1}', b"\xff", None])
def test_a_resume_without_a_readable_id_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    finish_run(tmp_path)
    if damage is None:
        (tmp_path / ENVIRONMENT).unlink()
    else:
        (tmp_path / ENVIRONMENT).write_bytes(damage)
    with pytest.raises(CheckpointError, match=ENVIRONMENT):
        RunDirectory(tmp_path, resume=True).__enter__()


def test_a_path_that_is_a_file_or_lies_under_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WriteError, match="--checkpoint-dir"):
            refuse_taken_directory(path, resume=False, overwrite=False)
        with pytest.raises(WriteError, match="--checkpoint-dir"):
            RunDirectory(path).__enter__()
    assert (tmp_path / "file").read_text() == "text"


def test_looking_at_a_path_makes_no_directory(tmp_path: Path) -> None:
    refuse_taken_directory(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def failing(error: OSError) -> Callable[..., int]:
    def fail(*arguments: object, **options: object) -> int:
        raise error

    return fail


def test_a_directory_without_write_permission_is_a_write_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Patched, because the tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "open", failing(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(WriteError, match=r"cannot be written to \(Permission denied\)"):
        RunDirectory(tmp_path).__enter__()


def test_writing_a_file_keeps_the_previous_one_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDirectory(tmp_path) as directory:
        directory.write("report.md", "first")
        assert stat.S_IMODE((tmp_path / "report.md").stat().st_mode) & 0o600 == 0o600
        full = failing(OSError(errno.ENOSPC, "No space left on device"))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"report\.md could not be written: No space"):
            directory.write("report.md", "second")
        assert (tmp_path / "report.md").read_text() == "first"


HOLD = """
import sys
from pathlib import Path
from annotated_mpnet.checkpoints.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_directory_in_use_is_refused_until_its_holder_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "locked\n"
        before = tree(tmp_path)
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with pytest.raises(CheckpointError, match=f"in use by 'process {holder.pid} on "):
                RunDirectory(tmp_path, resume, overwrite).__enter__()
        assert tree(tmp_path) == before
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    # The process could not clean up, but the kernel did.
    with RunDirectory(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_leaving_frees_the_directory_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path):
        print(1 // 0)
    with RunDirectory(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == ""


# Files of others.


@pytest.mark.parametrize(
    "name", [LOCK, ENVIRONMENT, "config.toml", "log.txt", "metrics.jsonl", "report.md", "loss.png"]
)
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory"])
def test_what_is_not_a_regular_file_is_refused_and_not_written_through(
    tmp_path: Path, name: str, kind: str
) -> None:
    important = tmp_path / "important"
    important.write_text("days of work")
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(important if kind == "link" else tmp_path / "nothing")
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(CheckpointError, match=f"{name} is (a link|not a regular file)"):
            refuse_taken_directory(path.parent, resume, overwrite)
        with pytest.raises(CheckpointError, match=f"{name} is (a link|not a regular file)"):
            RunDirectory(path.parent, resume, overwrite).__enter__()
    assert important.read_text() == "days of work"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "where",
    ["hf/thesis.tex", "checkpoint10/notes.md", "best_checkpoint/figures/a.png", "hf/.git/x"],
)
def test_overwrite_refuses_to_delete_what_no_run_wrote(tmp_path: Path, where: str) -> None:
    finish_run(tmp_path)
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("mine")
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"holds what no run writes.*nothing was deleted"):
            refuse_taken_directory(tmp_path, resume=False, overwrite=True)
        with pytest.raises(CheckpointError, match=r"holds what no run writes.*nothing was deleted"):
            RunDirectory(tmp_path, overwrite=True).__enter__()
    assert tree(tmp_path) == before


def test_a_first_save_that_fails_promises_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for earlier, said in ((False, "it is the first one.*--overwrite"), (True, "are intact")):
        if earlier:
            save(tmp_path, 5)
        with monkeypatch.context() as patch:
            patch.setattr("annotated_mpnet.checkpoints.checkpoint.save_file", full)
            with pytest.raises(WriteError, match=said):
                save(tmp_path, 10)
