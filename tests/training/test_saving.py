"""Checkpoints written during training: what they hold, and what happens if writing fails.

Signals and SIGKILL while the thread writes: ../test_signals_in_phases.py.
"""

import errno
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import make_checkpoint, save, save_tokenizer

from annotated_mpnet.checkpoints.checkpoint import BEST, load_checkpoint, save_checkpoint
from annotated_mpnet.errors import CheckpointError, DivergedError, WriteError
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.mpnet.optimizer import learning_rate
from annotated_mpnet.settings.config import PretrainingConfig
from folders import checkpoint_tree
from tiny_run import TinyText, changed, run, tiny_config
from waiting import HUNG

WRITE = "annotated_mpnet.checkpoints.checkpoint.save_file"
LOOP = threading.main_thread()


def config_of(text: TinyText, directory: Path) -> PretrainingConfig:
    """Eight updates; checkpoints after 3, 6 and 8, no evaluation."""
    return changed(
        tiny_config(text, directory),
        checkpoint_interval=3,
        valid_file=None,
        test_file=None,
        export_hf=False,
    )


def at_update(number: int, action: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Call a function between the gradient of an update (counted from 1) and its step."""

    def rate(update: int, optimization: OptimizationConfig) -> float:
        # The rate is read again after the step, for the log.
        if update == number - 1 and not done:
            done.append(action())
        return learning_rate(update, optimization)

    done: list[object] = []
    patch.setattr("annotated_mpnet.mpnet.loop.learning_rate", rate)


def test_updates_during_the_write_of_a_checkpoint_do_not_get_into_it(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, slowly = (config_of(text, tmp_path / name) for name in ("whole", "slowly"))
    run(whole)
    later, calls = threading.Event(), itertools.count(1)

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        # Checkpoint 3 is on disk only after update 5.
        if next(calls) == 1:
            assert threading.current_thread() is not LOOP
            assert later.wait(HUNG), "the loop waits for the disk"
            assert not (tmp_path / "slowly" / "checkpoint3").exists()
        save_file(tensors, path)

    monkeypatch.setattr(WRITE, slow)
    at_update(5, later.set, monkeypatch)
    run(slowly)
    for name in ("checkpoint3", "checkpoint6", "checkpoint8"):
        assert checkpoint_tree(tmp_path / "slowly" / name) == checkpoint_tree(
            tmp_path / "whole" / name
        )


def test_a_save_waits_for_the_one_before_and_the_last_is_there_when_the_run_has_ended(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config_of(text, tmp_path / "run"), checkpoint_interval=1, keep_checkpoints=2)
    writing = threading.Lock()
    updates = []

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert writing.acquire(blocking=False), "two are written at once"
        time.sleep(0.01)  # so that a second writer would come now
        updates.append(int(path.parent.name.removeprefix(".tmp-checkpoint")))
        save_file(tensors, path)
        writing.release()

    monkeypatch.setattr(WRITE, slow)
    run(config)
    # Each has two files: model and optimizer.
    assert updates == sorted([*range(1, 9), *range(1, 9)])
    assert {path.name for path in (tmp_path / "run").glob("*checkpoint*")} == {
        "checkpoint7",
        "checkpoint8",
    }


def test_the_best_model_and_the_checkpoint_of_an_update_share_a_copy(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With two copies, the second would wait until the first is written.
    config = changed(
        config_of(text, tmp_path / "run"),
        valid_file=text.valid_file,
        checkpoint_interval=4,
        eval_interval_steps=4,
    )
    later, calls = threading.Event(), itertools.count(1)

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if next(calls) == 1:
            assert later.wait(HUNG), "the loop waits for the disk"
        save_file(tensors, path)

    monkeypatch.setattr(WRITE, slow)
    at_update(6, later.set, monkeypatch)
    run(config)
    best, numbered = (tmp_path / "run" / each for each in ("best_checkpoint", "checkpoint8"))
    assert checkpoint_tree(best) == checkpoint_tree(numbered)
    # The disk holds their tensors once; those of the replaced best model belong to checkpoint4.
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert os.path.samefile(best / name, numbered / name)
    assert not os.path.samefile(best / "state.json", numbered / "state.json")
    assert load_checkpoint(tmp_path / "run" / "checkpoint4").state.update == 4
    shutil.rmtree(numbered)
    assert load_checkpoint(best).state.update == 8


def test_without_hard_links_both_are_written(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impossible(source: Path, target: Path) -> None:
        if target.name.startswith("optimizer"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        os.symlink(source, target)

    monkeypatch.setattr("annotated_mpnet.checkpoints.checkpoint.os.link", impossible)
    run(changed(config_of(text, tmp_path / "run"), valid_file=text.valid_file, total_updates=2))
    best, numbered = (tmp_path / "run" / each for each in ("best_checkpoint", "checkpoint2"))
    assert checkpoint_tree(best) == checkpoint_tree(numbered)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert not os.path.samefile(best / name, numbered / name)
    load_checkpoint(numbered)


def test_damage_of_the_first_is_not_taken_over_by_the_second(tmp_path: Path) -> None:
    best = save(tmp_path, 10, BEST)
    (best / "model.safetensors").write_bytes(b"damaged")
    save_checkpoint(tmp_path, "checkpoint10", make_checkpoint(10), save_tokenizer, BEST)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "checkpoint10")


def full_at(number: int, patch: pytest.MonkeyPatch, after: threading.Event | None = None) -> None:
    """Let the disk be full at the n-th file of tensors, and if an event is given, only after it."""
    calls = itertools.count(1)

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if next(calls) == number:
            assert after is None or after.wait(HUNG)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    patch.setattr(WRITE, full)


@pytest.mark.parametrize(("file", "whole"), [(2, set()), (4, {3}), (6, {3, 6})])
def test_a_full_disk_ends_the_run_and_damages_nothing(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: int,
    whole: set[int],
) -> None:
    config = config_of(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        full_at(file, patch)
        with pytest.raises(WriteError, match=r"No space left on device; needed 1 MB") as caught:
            run(config)
    assert caught.value.exit_code == 6
    saved = {path.name for path in (tmp_path / "run").glob("*checkpoint*")}
    assert saved == {f"checkpoint{update}" for update in whole}
    for update in whole:
        assert load_checkpoint(tmp_path / "run" / f"checkpoint{update}").state.update == update
    if whole:
        run(changed(config, resume=True))
        run(changed(config, checkpoint_dir=tmp_path / "whole"))
        ends = [checkpoint_tree(tmp_path / name / "checkpoint8") for name in ("run", "whole")]
        assert ends[0] == ends[1]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Future[object]]:
    """Collect what the loop has given to the writing thread."""
    given = list[Future[object]]()

    class Remembering(ThreadPoolExecutor):
        def submit(self, *arguments: object) -> Future[object]:  # type: ignore[override]
            given.append(super().submit(*arguments))  # type: ignore[arg-type]
            return given[-1]

    monkeypatch.setattr("annotated_mpnet.checkpoints.saving.ThreadPoolExecutor", Remembering)
    return given


def test_a_run_whose_directory_disappears_ends_with_one_line(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: list[Future[object]],
) -> None:
    config = config_of(text, tmp_path / "run")

    def disappear() -> None:
        # Not while checkpoint 3 is being written: removing would find its directory not empty.
        assert writes
        assert not wait(writes, HUNG).not_done
        shutil.rmtree(tmp_path / "run")

    at_update(5, disappear, monkeypatch)
    with pytest.raises(WriteError, match="checkpoint6") as caught:
        run(config)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_failed_write_is_noticed_before_the_next_update(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: list[Future[object]],
) -> None:
    config = changed(config_of(text, tmp_path / "run"), total_updates=40, checkpoint_interval=20)
    later, made = threading.Event(), list[int]()
    full_at(1, monkeypatch, after=later)

    def count(update: int, optimization: OptimizationConfig) -> float:
        made.append(update)
        # The write fails during update 21, long before the next save.
        if update == 20:
            later.set()
            assert not wait(writes, HUNG).not_done
        return learning_rate(update, optimization)

    monkeypatch.setattr("annotated_mpnet.mpnet.loop.learning_rate", count)
    with pytest.raises(WriteError):
        run(config)
    assert max(made) == 20


def test_a_signal_that_finds_the_disk_full_does_not_say_saved(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The signal in update 2 requests a checkpoint, which cannot be written.
    full_at(1, monkeypatch)
    at_update(2, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    with pytest.raises(WriteError):
        run(config_of(text, tmp_path / "run"))
    assert "saved after" not in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_fails_waits_for_its_last_checkpoint(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = threading.Event()

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert later.wait(HUNG)
        time.sleep(0.2)  # in which a run that does not wait would end
        save_file(tensors, path)

    def diverge() -> None:
        later.set()
        raise DivergedError("the loss is NaN")

    monkeypatch.setattr(WRITE, slow)
    at_update(5, diverge, monkeypatch)
    with pytest.raises(DivergedError):
        run(config_of(text, tmp_path / "run"))
    assert load_checkpoint(tmp_path / "run" / "checkpoint3").state.update == 3


def test_a_run_that_fails_reports_a_failed_write_too(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before update 4 the loop checks for failed writes; this one fails later.
    later = threading.Event()
    full_at(1, monkeypatch, after=later)

    def diverge() -> None:
        later.set()
        raise DivergedError("the loss is NaN")

    at_update(4, diverge, monkeypatch)
    with pytest.raises(DivergedError):
        run(config_of(text, tmp_path / "run"))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "warning: the last checkpoint was not saved either" in log
    assert "No space left on device" in log


def test_a_bug_in_the_thread_keeps_its_traceback(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WRITE, lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run(config_of(text, tmp_path / "run"))


def test_no_checkpoint_is_written_after_one_that_failed(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two names for one update: the second waits when the first finds the disk full.
    config = changed(
        config_of(text, tmp_path / "run"),
        valid_file=text.valid_file,
        checkpoint_interval=4,
        eval_interval_steps=4,
    )
    full_at(1, monkeypatch)
    with pytest.raises(WriteError):
        run(config)
    assert not list((tmp_path / "run").glob("*checkpoint*"))
