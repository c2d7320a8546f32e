"""A signal in each phase of a run: how it ends, what is on the disk, and how it resumes.

A phase is a function. Its name and the number of a call say exactly when a signal comes: just
before that call. So most of this is done in one process, by the command that the shell would call.
"""

import importlib
import itertools
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest

from annotated_mpnet import cli
from annotated_mpnet.checkpoints.checkpoint import load_checkpoint
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.errors import CheckpointError
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.signals import SIGNALS, Stopped, StopRequest, listening
from annotated_mpnet.tracking.report import REPORT
from folders import checkpoint_tree
from processes import forked
from ranks import arguments_of
from tiny_run import TinyText, bare_runs, changed, run, tiny_config, write_text
from waiting import HUNG, wait_for

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    """Write text to train on, and to evaluate by no more than takes two batches."""
    text = write_text(tmp_path_factory.mktemp("text"))
    for file in (text.valid_file, text.test_file):
        file.write_text(" ".join(file.read_text().split()[:100]))
    return text


@pytest.fixture(scope="module", autouse=True)
def bare() -> Iterator[None]:
    with bare_runs():
        yield


def config_of(text: TinyText, directory: Path) -> PretrainingConfig:
    """Eight updates of two micro-batches: checkpoints after 3, 6, 8, evaluations after 4, 8."""
    return changed(tiny_config(text, directory), checkpoint_interval=3, export_hf=False)


@dataclass(frozen=True)
class Phase:
    """A moment of a run.

    Attributes:
        name: for people.
        function: which is about to be called, by its full name.
        call: for the so many-th time, from 1.
        done: updates that are done when a signal at this moment has stopped the run.
        at_most: the same, where the moment comes beside the loop, which may be further by then.
    """

    name: str
    function: str
    call: int = 1
    done: int = 0
    at_most: int | None = None


HERE = "annotated_mpnet"

BEFORE = [
    Phase("loading the tokenizer", f"{HERE}.runs.texts.load_tokenizer"),
    Phase("reading the text", f"{HERE}.text.packing.write_text"),
    Phase("tokenising", f"{HERE}.text.packing.tokenise"),
    Phase("packing", f"{HERE}.text.packing.SequenceWriter.write"),
    Phase("making the network", f"{HERE}.runs.run.build_model"),
    Phase("making the optimizer", f"{HERE}.runs.run.choose_optimizer"),
]
STEP = f"{HERE}.mpnet.loop.set_learning_rate"
"""What is called between the gradient of an update and the optimizer's step."""

WITHIN = [
    Phase("waiting for the first batch", f"{HERE}.runs.hooks._next", 1, done=1),
    Phase("making the first batch", f"{HERE}.training.loader.BatchLoader.batch", 1, done=1),
    Phase("forward", f"{HERE}.mpnet.pretraining.MPNetForPretraining.loss_sum", 9, done=5),
    Phase("backward", "torch.Tensor.backward", 9, done=5),
    Phase("accumulating", f"{HERE}.mpnet.pretraining.MPNetForPretraining.loss_sum", 10, done=5),
    Phase("before the step", STEP, 5, done=5),
    Phase("after the step", f"{HERE}.runs.hooks.RunHooks.updated", 5, done=5),
    Phase("logging", f"{HERE}.tracking.tracker.Tracker.log", 4, done=6),
    Phase("beginning to evaluate", f"{HERE}.mpnet.loop.cross_entropy_sum", 1, done=4),
    Phase("evaluating", f"{HERE}.mpnet.loop.cross_entropy_sum", 2, done=4),
    # A checkpoint is written in a thread, which the loop waits for when it saves again: that of
    # update 3 when it has found the best one after update 4, and stops there.
    Phase("saving", f"{HERE}.checkpoints.checkpoint.save_file", 2, done=4),
    Phase("publishing", f"{HERE}.checkpoints.checkpoint._keep_damaged", 1, done=4),
    Phase("pruning", f"{HERE}.checkpoints.saving.prune", 1, done=4),
    # The best one is waited for after update 6, which has already asked whether to stop.
    Phase("saving the best", f"{HERE}.checkpoints.checkpoint.save_file", 4, done=4, at_most=7),
]
AFTER = [
    Phase("testing", f"{HERE}.training.trainer.Trainer.evaluate", 3, done=8),
    Phase("exporting", f"{HERE}.conversion.export.compare_logits", 1, done=8),
    Phase("reporting", f"{HERE}.runs.run.write_report", 1, done=8),
]


def names(phases: list[Phase]) -> list[str]:
    return [phase.name for phase in phases]


def signal_at(
    phase: Phase, patch: pytest.MonkeyPatch, *numbers: int, after: Path | None = None
) -> None:
    """Send this process signals in a phase, and not before a path exists, if one is given."""
    function, calls = pkgutil.resolve_name(phase.function), itertools.count(1)

    def with_signals(*arguments: object, **options: object) -> object:
        if next(calls) == phase.call:
            if after is not None:
                wait_for(after.exists)
            for number in numbers:
                signal.raise_signal(number)
        return function(*arguments, **options)

    patch.setattr(phase.function, with_signals)


def pretrain(config: PretrainingConfig) -> int:
    """Run the command in this process, and return its exit code."""
    return cli._ending("pretrain-mpnet", cli._pretrain, arguments_of(config))


@pytest.fixture(scope="module")
def uninterrupted(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run without a signal."""
    config = config_of(text, tmp_path_factory.mktemp("uninterrupted") / "run")
    run(config)
    return config.run.checkpoint_dir


def assert_same_end(directory: Path, uninterrupted: Path) -> None:
    """Assert that a run ended in the same bytes, its best model included."""
    for name in ("checkpoint8", "best_checkpoint"):
        assert checkpoint_tree(directory / name) == checkpoint_tree(uninterrupted / name), name
    left = {path.name for path in directory.iterdir()}
    assert not {name for name in left if name.startswith((".tmp-", ".old-"))}


IMPORTING = """
import signal, sys

class SignalBeforeTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            signal.raise_signal({number})

sys.meta_path.insert(0, SignalBeforeTorch())
from annotated_mpnet.cli import pretrain
pretrain()
"""


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)])
def test_signal_while_importing_ends_the_command_in_one_line(
    text: TinyText, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = arguments_of(config_of(text, tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.format(number=int(number)), *arguments],
        capture_output=True,
        text=True,
        timeout=HUNG,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"pretrain-mpnet: stopped by {number.name}\n"
    assert not (tmp_path / "run").exists()


HALF_A_MODULE = """
import signal

whole = False
signal.raise_signal(signal.SIGTERM)
whole = True
"""


def test_signal_while_importing_waits_until_a_module_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch imports NumPy from C++, drops any exception, and would go on with half of NumPy.
    (tmp_path / "half_a_module.py").write_text(HALF_A_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Stopped, match="SIGTERM"), listening():
        import_and_wait("half_a_module")
    assert sys.modules.pop("half_a_module").whole


def import_and_wait(name: str) -> None:
    """Import a module, then wait for a signal."""
    importlib.import_module(name)
    wait_for(lambda: False)


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)])
@pytest.mark.parametrize("phase", BEFORE, ids=names(BEFORE))
def test_signal_before_the_first_update_stops_at_once_and_nothing_is_written(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    phase: Phase,
    number: signal.Signals,
    code: int,
) -> None:
    # An empty cache, or the text would not be read at all.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    signal_at(phase, monkeypatch, number)
    assert pretrain(config_of(text, tmp_path / "run")) == code
    said = capfd.readouterr()
    assert said.err.splitlines()[-1] == f"pretrain-mpnet: stopped by {number.name}"
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()
    # The cache may hold sequences by now, but no partial file.
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".partial"] == []


def test_a_run_can_start_again_after_a_signal_before_the_first_update(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    config = config_of(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(Phase("looking at the text", f"{HERE}.runs.run.measure_plateau"), patch, TERM)
        assert pretrain(config) == 143
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    run(config)
    assert_same_end(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("phase", "number"),
    list(zip(WITHIN, itertools.cycle(SIGNALS), strict=False)),
    ids=names(WITHIN),
)
def test_signal_within_the_loop_saves_the_last_update_that_was_done(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uninterrupted: Path,
    phase: Phase,
    number: signal.Signals,
) -> None:
    config = config_of(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(phase, patch, number)
        assert pretrain(config) == 128 + number
    (said,) = re.findall(
        r"saved after update (\d+); continue with --resume", capsys.readouterr().out
    )
    done = int(said)
    assert phase.done <= done <= (phase.at_most or phase.done)
    assert load_checkpoint(tmp_path / "run" / f"checkpoint{done}").state.update == done
    saved = {path.name for path in (tmp_path / "run").glob("checkpoint*")}
    assert saved == {f"checkpoint{update}" for update in {done, 3, 6} if update <= done}
    run(changed(config, resume=True))
    assert_same_end(tmp_path / "run", uninterrupted)


LAST = [
    Phase("before the last step", STEP, 8, done=8),
    Phase("beginning the last evaluation", f"{HERE}.mpnet.loop.cross_entropy_sum", 3, done=8),
]


@pytest.mark.parametrize("phase", LAST, ids=names(LAST))
def test_signal_in_the_last_update_leaves_evaluation_test_and_report_to_the_resume(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Path,
    phase: Phase,
) -> None:
    config = config_of(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(phase, patch, TERM)
        assert pretrain(config) == 143
    assert load_checkpoint(tmp_path / "run" / "checkpoint8").state.evaluation_due
    assert not (tmp_path / "run" / REPORT).exists()
    result, _ = run(changed(config, resume=True))
    assert result.test is not None
    assert_same_end(tmp_path / "run", uninterrupted)


def test_abandoned_evaluation_is_not_logged_and_the_resume_logs_it_once(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    config = config_of(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(Phase("", f"{HERE}.mpnet.loop.cross_entropy_sum", 1), patch, TERM)
        assert pretrain(config) == 143
    assert load_checkpoint(tmp_path / "run" / "checkpoint4").state.evaluation_due
    assert not (tmp_path / "run" / "best_checkpoint").exists()
    # The repeated evaluation is logged, but the run dies before it has saved anything else.
    with monkeypatch.context() as patch:
        patch.setattr(f"{HERE}.runs.hooks.RunHooks.save", Mock(side_effect=KeyError))
        with pytest.raises(KeyError):
            run(changed(config, resume=True))
    assert len(evaluations(tmp_path / "run")) == 1
    run(changed(config, resume=True))
    assert len(evaluations(uninterrupted)) == 2
    assert evaluations(tmp_path / "run") == evaluations(uninterrupted)
    guesses = [each / "guesses.jsonl" for each in (tmp_path / "run", uninterrupted)]
    assert guesses[0].read_bytes() == guesses[1].read_bytes()


def evaluations(directory: Path) -> list[str]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if "valid/bits" in line]


@pytest.mark.parametrize("phase", AFTER, ids=names(AFTER))
def test_what_a_signal_after_the_loop_prevents_is_made_by_the_resume(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uninterrupted: Path,
    phase: Phase,
) -> None:
    config = changed(config_of(text, tmp_path / "run"), export_hf=True)
    with monkeypatch.context() as patch:
        signal_at(phase, patch, INT)
        assert pretrain(config) == 130
    assert_same_end(tmp_path / "run", uninterrupted)
    exported = tmp_path / "run" / "hf"
    assert exported.exists() == (phase.name == "reporting")
    assert not (tmp_path / "run" / REPORT).exists()
    assert pretrain(changed(config, resume=True)) == 0
    said = capsys.readouterr().out
    assert "test text: " in said
    assert exported.exists()
    assert (tmp_path / "run" / REPORT).exists()
    assert_same_end(tmp_path / "run", uninterrupted)
    assert pretrain(changed(config, resume=True)) == 0
    assert "complete, with 8 updates" in capsys.readouterr().out


def test_more_signals_while_saving_change_neither_the_checkpoint_nor_the_exit_code(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    config = config_of(text, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(Phase("before the step", STEP, 5), patch, TERM)
        # After the files of checkpoint3 and of the best one after update 4, these are the stop's.
        signal_at(Phase("saving", f"{HERE}.checkpoints.checkpoint.save_file", 6), patch, INT, INT)
        signal_at(
            Phase("publishing", f"{HERE}.checkpoints.checkpoint._keep_damaged", 3), patch, TERM
        )
        assert pretrain(config) == 143
    assert load_checkpoint(tmp_path / "run" / "checkpoint5").state.update == 5
    run(changed(config, resume=True))
    assert_same_end(tmp_path / "run", uninterrupted)


KILLED = [
    (Phase("tokenising", f"{HERE}.text.packing.tokenise"), {}),
    (Phase("looking at the text", f"{HERE}.runs.run.measure_plateau"), {}),
    # There is a line of metrics by then, but no checkpoint.
    (Phase("before the third step", STEP, 3), {"overwrite": True}),
    (
        Phase("forward", f"{HERE}.mpnet.pretraining.MPNetForPretraining.loss_sum", 9),
        {"resume": True},
    ),
    (Phase("evaluating", f"{HERE}.mpnet.loop.cross_entropy_sum", 2), {"resume": True}),
    (Phase("saving", f"{HERE}.checkpoints.checkpoint.save_file", 6), {"resume": True}),
    (Phase("publishing", f"{HERE}.checkpoints.checkpoint._keep_damaged", 3), {"resume": True}),
    (Phase("logging", f"{HERE}.tracking.tracker.Tracker.log", 5), {"resume": True}),
]
"""Moments at which a run is killed, and the flags of the next start."""


def die_in_each_phase(text: TinyText, directory: Path) -> None:
    """Start the same run for each moment, in a process that dies there."""
    for number, (phase, how) in enumerate(KILLED):
        # A thread writes the first checkpoint, and may be slower than the loop.
        saved = directory / f"run{number}" / "checkpoint3" if "resume" in how else None
        child = os.fork()
        if child == 0:
            datasets.config.HF_DATASETS_CACHE = directory / f"cache{number}"
            signal_at(phase, pytest.MonkeyPatch(), signal.SIGKILL, after=saved)
            run(config_of(text, directory / f"run{number}"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, phase.name


@pytest.fixture(scope="module")
def killed(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the runs that were killed.

    In a process of its own: forking this one, with its threads, would not be safe.
    """
    directory = tmp_path_factory.mktemp("killed")
    process = forked(die_in_each_phase, text, directory)
    process.join(HUNG)
    assert process.exitcode == 0
    return directory


@pytest.mark.parametrize("number", range(len(KILLED)), ids=[phase.name for phase, _ in KILLED])
def test_killed_run_goes_on_to_the_same_end(
    text: TinyText,
    monkeypatch: pytest.MonkeyPatch,
    killed: Path,
    uninterrupted: Path,
    number: int,
) -> None:
    # With the cache as it was left, too.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", killed / f"cache{number}")
    directory = killed / f"run{number}"
    config = changed(config_of(text, directory), **KILLED[number][1])
    run(config)
    assert_same_end(directory, uninterrupted)


def test_run_without_a_checkpoint_says_how_it_begins_anew(text: TinyText, tmp_path: Path) -> None:
    config = config_of(text, tmp_path / "run")
    run(changed(config, total_updates=2))
    for saved in (tmp_path / "run").glob("*checkpoint*"):
        shutil.rmtree(saved)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*--overwrite"):
        run(changed(config, resume=True))
    run(changed(config, total_updates=2, overwrite=True))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* without it"):
        run(changed(config, checkpoint_dir=tmp_path / "elsewhere", resume=True))
    assert not (tmp_path / "elsewhere").exists()


SLOWLY = """
import time
from annotated_mpnet.mpnet import loop
function = loop.set_learning_rate
def slowly(*arguments):
    time.sleep(0.05)
    return function(*arguments)
loop.set_learning_rate = slowly
from annotated_mpnet.cli import pretrain
pretrain()
"""


def test_run_outlives_its_reader_and_a_pause_and_saves_when_the_terminal_hangs_up(
    text: TinyText, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # Far more updates than are made before it is stopped. At a constant rate, a run that ends
    # earlier is the same run.
    config = changed(
        config_of(text, tmp_path / "run"),
        total_updates=100_000,
        end_learning_rate=1e-3,
        logging_steps=1,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments_of(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    request.addfinalizer(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 4, process)

    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    before = metrics.read_text()
    time.sleep(0.3)  # in which a process that is not paused would write
    assert metrics.read_text() == before
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: metrics.read_text().count("\n") > before.count("\n") + 4, process)

    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=HUNG)[1].decode()
    assert process.returncode == 129, said
    assert "stopped by SIGHUP" in said
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("the output is closed") == 1
    assert "; continue with --resume" in log
    (last, *_) = newest_first(tmp_path / "run")
    end = load_checkpoint(last).state.update + 2
    run(changed(config, total_updates=end, resume=True))
    run(changed(config, total_updates=end, checkpoint_dir=tmp_path / "whole"))
    ends = [checkpoint_tree(tmp_path / name / f"checkpoint{end}") for name in ("run", "whole")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with listening(request := StopRequest()), listening():
            signal.raise_signal(number)
        assert request.number is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
