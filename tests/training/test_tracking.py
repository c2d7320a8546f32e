"""All sinks get the same metrics, a resume repeats none, and no sink can end a run."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from annotated_mpnet.errors import ConfigError
from annotated_mpnet.mpnet.config import OptimizationConfig
from annotated_mpnet.settings.config import PretrainingConfig, RunConfig, TrackingConfig
from annotated_mpnet.tracking.guesses import Guess, read_guesses
from annotated_mpnet.tracking.sinks import (
    append,
    check_tracking,
    plain_settings,
    read_metrics,
)
from annotated_mpnet.tracking.tracker import Tracker
from waiting import HUNG

TRAIN = {
    "train/loss": 6.0,
    "train/bits": 8.66,
    "train/learning_rate": 1e-3,
    "train/gradient_norm": 0.8,
    "perf/tokens_per_second": 21480.0,
    "perf/predicted_per_second": 3020.0,
    "perf/mfu": 0.41,
    "perf/data_wait": 0.01,
    "memory/peak_gb": 0.9,
}
VALID = {"valid/loss": 6.1, "valid/bits": 8.8, "valid/accuracy": 0.12}
FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")


def config_of(directory: Path, total: int = 100, **tracking: object) -> PretrainingConfig:
    return PretrainingConfig(
        optimization=OptimizationConfig(total_updates=total),
        run=RunConfig(checkpoint_dir=directory),
        tracking=TrackingConfig(**tracking),  # type: ignore[arg-type]
    )


def tracker_of(
    directory: Path, total: int = 100, terminal: bool = False, **tracking: object
) -> tuple[Tracker, io.StringIO]:
    said = io.StringIO()
    console = Console(file=said, width=80, force_terminal=terminal)
    return Tracker(
        directory, "0123abcd" * 4, config_of(directory, total, **tracking), console
    ), said


def events_in(directory: Path) -> Mapping[str, list[tuple[int, float]]]:
    """Return each curve as TensorBoard reads it: (update, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        name: [(each.step, each.value) for each in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


# The run's own files.


def test_each_line_of_metrics_is_an_object_with_its_update(tmp_path: Path) -> None:
    tracker, _ = tracker_of(tmp_path)
    with tracker:
        tracker.log(20, TRAIN)
        tracker.log(40, VALID)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 20, **TRAIN}, {"step": 40, **VALID}]


def test_nan_is_written_as_valid_json(tmp_path: Path) -> None:
    tracker, _ = tracker_of(tmp_path)
    tracker.log(1, {"valid/bits": float("nan"), "valid/accuracy": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "valid/bits": None, "valid/accuracy": 0.5}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "valid/accuracy": 0.5}]


def test_rewinding_drops_later_and_incomplete_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20}\n{"step": 40}\n{"step": 60}\n{"step": 8')
    tracker, _ = tracker_of(tmp_path)
    assert tracker.rewind(40) == 2
    assert path.read_text() == '{"step": 20}\n{"step": 40}\n'
    assert tracker.rewind(40) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewinding_a_run_without_metrics_does_nothing(tmp_path: Path) -> None:
    assert tracker_of(tmp_path)[0].rewind(5) == 0


def test_log_keeps_each_message_with_its_time(tmp_path: Path) -> None:
    tracker, said = tracker_of(tmp_path)
    tracker.say("a line with [brackets]")
    tracker.warn("careful")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d a line with \[brackets\]", first)
    assert second.endswith("warning: careful")
    assert said.getvalue() == "a line with [brackets]\nwarning: careful\n"


def test_an_unused_tracker_writes_no_file(tmp_path: Path) -> None:
    tracker_of(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_silent_tracker_prints_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.silent()
    with tracker:
        tracker.say("something")
        tracker.warn("something else")
        tracker.watch(nn.Linear(2, 2))
        tracker.progress(1)
        tracker.log(2, TRAIN)
        assert tracker.rewind(1) == 0
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


# The console.


def test_without_a_terminal_each_line_of_metrics_is_printed_whole(tmp_path: Path) -> None:
    tracker, said = tracker_of(tmp_path)
    with tracker:
        tracker.log(20, TRAIN)
        tracker.log(20, VALID)
    assert said.getvalue().splitlines() == [
        "update 20: train 8.66 bits  21.5k tok/s  3.0k predicted/s  mfu 41%",
        "update 20: valid 8.80 bits  acc 0.120",
    ]


def test_the_learning_rate_and_the_progress_of_an_evaluation_are_live(tmp_path: Path) -> None:
    tracker, said = tracker_of(tmp_path, terminal=True)
    with tracker:
        tracker.log(20, TRAIN)
        tracker.evaluating(3, 51)
        tracker._live.refresh()
    assert "train 8.66 bits  lr 0.001" in said.getvalue()
    assert "evaluating 3/51" in said.getvalue()


def test_without_live_lines_a_long_evaluation_reports_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, said = tracker_of(tmp_path)
    clock = iter([100, 110, 131, 140, 160, 161])
    monkeypatch.setattr(
        "annotated_mpnet.tracking.tracker.time.perf_counter", lambda: float(next(clock))
    )
    for done in range(6):
        tracker.evaluating(done, 2000)
    assert said.getvalue().splitlines() == [
        "evaluating: 2 of 2,000 batches, 8 h 36 min left",
        "evaluating: 5 of 2,000 batches, 6 h 45 min left",
    ]


def test_guesses_are_kept_with_their_update_and_shown(tmp_path: Path) -> None:
    guess = Guess("it is a", "truth", "universally", 0.25, [("truth", 0.25), ("[b]", 0.002)])
    tracker, said = tracker_of(tmp_path)
    tracker.guessed(20, [guess, guess])
    tracker.guessed(40, [guess])
    assert said.getvalue().startswith('  it is a [truth] universally: truth 25%, "[b]" 0.2%\n')
    path = tmp_path / "guesses.jsonl"
    assert read_guesses(path) == [(20, guess), (20, guess), (40, guess)]
    tracker.rewind(20)
    assert read_guesses(path) == [(20, guess), (20, guess)]
    # Damaged lines do not affect the others.
    with path.open("a") as file:
        file.write('{"step": 60, "word": 7}\n[1]\n{"step"')
    assert len(read_guesses(path)) == 2


def test_terminal_keeps_only_validations_above_its_live_lines(tmp_path: Path) -> None:
    tracker, said = tracker_of(tmp_path, terminal=True)
    with tracker:
        tracker.log(20, TRAIN)
        tracker.log(20, VALID)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", said.getvalue())
    assert "update 20: train" not in shown
    assert "update 20: valid 8.80 bits" in shown
    assert "update 20: train" in (tmp_path / "log.txt").read_text()
    assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= 80


def test_the_expected_end_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    tracker, said = tracker_of(tmp_path, total=101)
    for update in range(1, 22):
        # The first update takes a minute, the others 2 seconds each.
        now[0] += 60.0 if update == 1 else 2.0
        if update % 7 == 0:
            tracker.log(update, TRAIN)
        tracker.progress(update)
    lines = said.getvalue().splitlines()
    assert re.fullmatch(r"finishes at about .* \(in 3 min 8 s\) at this speed", lines[1])
    assert len([line for line in lines if line.startswith("finishes")]) == 1
    assert lines[-1].endswith("2 min 40 s left")


def test_a_finished_run_has_no_time_left(tmp_path: Path) -> None:
    tracker, said = tracker_of(tmp_path, total=3)
    for update in (1, 2, 3):
        tracker.progress(update)
    tracker.log(3, TRAIN)
    assert "left" not in said.getvalue()
    assert "finishes" not in said.getvalue()


PIPED = """
import select, sys
from pathlib import Path
from rich.console import Console
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.tracking.tracker import Tracker
tracker = Tracker(Path(sys.argv[1]), "id", PretrainingConfig(), Console())
with tracker:
    for update in range(1, 2000):
        tracker.log(update, {"train/bits": 8.0})
        if update == 1 and sys.argv[2:] == ["until-pipe-closes"]:
            reader = select.poll()
            reader.register(1, 0)
            reader.poll()
"""


def in_shell(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    start = f"{sys.executable} -c '{PIPED}' {directory}"
    return subprocess.run(
        ["bash", "-c", command.format(start)], capture_output=True, text=True, timeout=HUNG
    )


def test_training_continues_when_its_output_is_closed(tmp_path: Path) -> None:
    # The pipe's buffer could hold all output, and `head` may be slow to exit.
    done = in_shell("{0} until-pipe-closes | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1999
    assert (tmp_path / "log.txt").read_text().count(
        "the output is closed; the run continues without it"
    ) == 1


@needs_dev_full
def test_training_continues_when_its_output_is_a_full_disk(tmp_path: Path) -> None:
    in_shell("{0} > /dev/full", tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1999


# Each failing sink gives one warning.


@needs_dev_full
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_full_disk_is_a_single_warning(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(FULL)
    tracker, said = tracker_of(tmp_path)
    with tracker:
        for update in range(1, 6):
            tracker.log(update, TRAIN)
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning")]
    (warning,) = warnings
    assert name in warning
    assert "No space left" in warning
    other = {"metrics.jsonl": "log.txt", "log.txt": "metrics.jsonl"}[name]
    assert len((tmp_path / other).read_text().splitlines()) >= 5


def test_a_line_that_a_full_disk_cuts_off_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AlmostFull(io.FileIO):
        def write(self, data: object, /) -> int:
            return super().write(bytes(data)[:7])  # type: ignore[call-overload]

    path = tmp_path / "lines"
    append(path, "the first\n")
    opened = lambda path, mode, buffering: AlmostFull(path, "ab")  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(OSError, match="No space left"):
            append(path, "the second\n")
    append(path, "the third\n")
    assert path.read_text() == "the first\nthe third\n"


def test_metrics_survive_a_rewind_that_finds_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, said = tracker_of(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20}\n{"step": 40}\n')

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert tracker.rewind(20) == 0
    assert path.read_text() == '{"step": 20}\n{"step": 40}\n'
    assert "No space left" in said.getvalue()


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "close"])
def test_whatever_a_sink_raises_is_a_single_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("the network\nis down")

    monkeypatch.setattr(SummaryWriter, method, fail)
    tracker, said = tracker_of(tmp_path, tensorboard_log_dir=tmp_path / "events")
    with tracker:
        for update in range(1, 6):
            tracker.log(update, TRAIN)
    warnings = [line for line in said.getvalue().splitlines() if line.startswith("warning")]
    expected = "warning: TensorBoard failed: the network is down; training continues without it"
    assert warnings == [expected]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


# TensorBoard.


def test_tensorboard_has_the_same_names_and_numbers(tmp_path: Path) -> None:
    tracker, _ = tracker_of(tmp_path, tensorboard_log_dir=tmp_path / "tb" / "run")
    with tracker:
        tracker.log(20, TRAIN)
        tracker.log(40, TRAIN)
        tracker.log(40, VALID)
    curves = events_in(tmp_path / "tb" / "run")
    assert set(curves) == {*TRAIN, *VALID}
    assert curves["train/bits"] == [(20, pytest.approx(8.66)), (40, pytest.approx(8.66))]
    assert curves["valid/bits"] == [(40, pytest.approx(8.8))]


def test_tensorboard_of_a_resumed_run_shows_each_update_once(tmp_path: Path) -> None:
    def start(resumed_from: int, last: int, value: float) -> None:
        tracker, _ = tracker_of(tmp_path, tensorboard_log_dir=tmp_path / "tb")
        if resumed_from:
            tracker.rewind(resumed_from)
        with tracker:
            for update in range(resumed_from + 10, last + 1, 10):
                tracker.log(update, {"train/bits": value})

    start(0, 60, 1.0)
    # Killed after update 60, with the newest checkpoint at update 30.
    start(30, 50, 2.0)
    expected = [(10, 1.0), (20, 1.0), (30, 1.0), (40, 2.0), (50, 2.0)]
    assert events_in(tmp_path / "tb")["train/bits"] == expected
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["train/bits"]) for record in records] == expected


# TensorBoard's writer thread ends with its own traceback.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_a_single_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracker, said = tracker_of(tmp_path, tensorboard_log_dir=tmp_path / "tb")
    with tracker:
        tracker.log(1, TRAIN)
        monkeypatch.setattr(RecordWriter, "write", full)
        for update in range(2, 6):
            tracker.log(update, TRAIN)
    (warning,) = [line for line in said.getvalue().splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: TensorBoard failed: [Errno 28] No space left on device")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert events_in(tmp_path / "tb")["train/bits"] == [(1, pytest.approx(8.66))]


def test_tensorboard_has_each_point_before_the_next_update(tmp_path: Path) -> None:
    tracker, _ = tracker_of(tmp_path, tensorboard_log_dir=tmp_path / "tb")
    with tracker:
        tracker.log(20, VALID)
        assert events_in(tmp_path / "tb")["valid/bits"] == [(20, pytest.approx(8.8))]


# Weights & Biases, without network.


class FakeRun:
    """The parts of a W&B run that the sink uses."""

    offline = True
    dir = "wandb/offline-run/files"

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.calls: list[object] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def watch(self, model: nn.Module, log: str, log_freq: int) -> None:
        self.calls.append(("watch", log, log_freq))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeRun, dict[str, object]]:
    import wandb

    run, given = FakeRun(), {}

    def init(**arguments: object) -> FakeRun:
        given.update(arguments)
        return run

    monkeypatch.setattr(wandb, "init", init)
    return run, given


def test_wandb_gets_the_same_dictionaries(
    tmp_path: Path, fake_wandb: tuple[FakeRun, dict[str, object]]
) -> None:
    run, _ = fake_wandb
    tracker, _ = tracker_of(tmp_path, wandb=True)
    with tracker:
        tracker.log(20, TRAIN)
        tracker.log(40, VALID)
    assert run.logged == [{"step": 20, **TRAIN}, {"step": 40, **VALID}]
    # Every metric is plotted over updates, not over W&B's count of calls.
    assert run.calls == [("*", "step"), ("finish", 0)]


def test_wandb_continues_the_run_of_the_directory(
    tmp_path: Path, fake_wandb: tuple[FakeRun, dict[str, object]]
) -> None:
    _, given = fake_wandb
    with tracker_of(tmp_path / "my_run", wandb=True)[0]:
        pass
    assert given["id"] == "0123abcd" * 4
    assert given["resume"] == "allow"
    assert given["name"] == "my_run"
    assert given["project"] == "annotated-mpnet"
    with tracker_of(tmp_path, wandb=True, wandb_id="theirs", wandb_name="a name")[0]:
        pass
    assert (given["id"], given["name"]) == ("theirs", "a name")


def test_wandb_learns_that_a_run_failed(
    tmp_path: Path, fake_wandb: tuple[FakeRun, dict[str, object]]
) -> None:
    run, _ = fake_wandb
    with pytest.raises(KeyError), tracker_of(tmp_path, wandb=True)[0]:
        raise KeyError
    assert run.calls[-1] == ("finish", 1)


@pytest.mark.parametrize("watch", [True, False])
def test_wandb_watches_the_model_if_asked_to(
    tmp_path: Path, fake_wandb: tuple[FakeRun, dict[str, object]], watch: bool
) -> None:
    run, _ = fake_wandb
    with tracker_of(tmp_path, wandb=True, wandb_watch=watch)[0] as tracker:
        tracker.watch(nn.Linear(2, 2))
    # 25 updates of 8 micro-batches each, the defaults.
    assert (("watch", "all", 200) in run.calls) == watch


def test_no_secret_goes_to_wandb() -> None:
    config = PretrainingConfig(run=RunConfig(hf_model_path="https://me:hunter2@example.org/m"))
    settings = plain_settings(config)
    assert settings["run"]["hf_model_path"] == "https://example.org/m"
    json.dumps(settings)  # plain values only


def test_wandb_offline_writes_here_and_takes_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "hunter2-canary"
    program = """
import sys
from pathlib import Path
from rich.console import Console
from annotated_mpnet.settings.config import *
from annotated_mpnet.tracking.tracker import Tracker
config = PretrainingConfig(tracking=TrackingConfig(wandb=True))
with Tracker(Path("."), "0123abcd", config, Console()) as tracker:
    tracker.log(1, {"train/bits": 8.0})
"""
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": canary * 3,
        "HF_TOKEN": canary,
    }
    done = subprocess.run(
        [sys.executable, "-c", program, f"--hub-token={canary}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HUNG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("W&B: ")
    (run,) = (tmp_path / "wandb").glob("offline-run-*-0123abcd/run-0123abcd.wandb")
    assert b"train/bits" in run.read_bytes()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or canary.encode() not in file.read_bytes(), file


# Before any text is read.


@pytest.mark.parametrize(
    ("package", "tracking"),
    [
        ("tensorboard", TrackingConfig(tensorboard_log_dir=Path("runs"))),
        ("wandb", TrackingConfig(wandb=True)),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, package: str, tracking: TrackingConfig
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'annotated-mpnet\[{package}\]'"):
        check_tracking(tracking)


def test_no_package_is_needed_without_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_tracking(TrackingConfig())


def test_watching_needs_wandb() -> None:
    with pytest.raises(ConfigError, match="--wandb-watch needs --wandb"):
        check_tracking(TrackingConfig(wandb_watch=True))


def test_wandb_without_a_key_is_refused_before_it_can_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "setup", lambda settings: None)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        check_tracking(TrackingConfig(wandb=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracking(TrackingConfig(wandb=True))


def test_metrics_are_readable_while_the_file_grows(tmp_path: Path) -> None:
    tracker, _ = tracker_of(tmp_path)
    for update in (1, 2):
        tracker.log(update, VALID)
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": update, **VALID}
