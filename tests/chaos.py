"""Interrupt runs at random moments and compare the results: `python tests/chaos.py --kills 50`.

A tiny run is trained once without interruption. Then the same command is started again and again,
and killed by a random signal at a random moment, until it finishes. It must end in the same bytes:
weights, optimizer, state, best checkpoint, and the evaluations in `metrics.jsonl`.

After that: a disk that fills and is freed, a killed rank of two, two resumes at the same time, and
a resume of a finished run. Prints a line for each, and exits with 1 if anything differs.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from annotated_mpnet.settings.config import PretrainingConfig
from folders import checkpoint_tree, tree
from ranks import arguments_of, environment, open_store
from tiny_run import changed, tiny_config, write_text
from waiting import HUNG

SIGNALS = {
    signal.SIGKILL: -9,
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
    signal.SIGHUP: 129,
}
"""Signals, and the exit codes that they must lead to."""

UPDATES = 30


class Chaos:
    """A folder with a text, an uninterrupted run, and interrupted runs."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.text = write_text(folder / "text")
        self.environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        self.failures = 0
        self.whole = self.run_whole("whole", ranks=1)

    def config(self, name: str, ranks: int = 1, **changes: object) -> PretrainingConfig:
        config = changed(
            tiny_config(self.text, self.folder / name),
            total_updates=UPDATES,
            checkpoint_interval=5,
            logging_steps=1,
            batch_size=4 // ranks,
            export_hf=ranks == 1,
        )
        return changed(config, **changes)

    def start(
        self, config: PretrainingConfig, rank: dict[str, str] | None = None, limit: int = 0
    ) -> subprocess.Popen[str]:
        """Start the command; `limit` is the maximum size in bytes of a file that it may write."""
        return subprocess.Popen(
            [sys.executable, "-m", "annotated_mpnet", *arguments_of(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment | (rank or {}),
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            if limit
            else None,
        )

    def run_whole(self, name: str, ranks: int) -> Path:
        for process in self.start_all(name, ranks):
            _, said = process.communicate(timeout=HUNG)
            if process.returncode != 0:
                raise SystemExit(f"the uninterrupted run failed: {said}")
        return self.folder / name

    def start_all(self, name: str, ranks: int) -> list[subprocess.Popen[str]]:
        """Start or resume a run of one or two ranks."""
        config = self.config(name, ranks, **self.how(self.folder / name))
        if ranks == 1:
            return [self.start(config)]
        self.store = open_store()
        return [
            self.start(config, environment(rank, ranks, self.store.port)) for rank in range(ranks)
        ]

    def how(self, directory: Path) -> dict[str, object]:
        """Return the flag with which a user would continue in a directory."""
        if any(directory.glob("*checkpoint*/manifest.json")):
            return {"resume": True}
        return {"overwrite": True} if (directory / "metrics.jsonl").exists() else {}

    def said(self, line: str, fault: str | None) -> None:
        self.failures += fault is not None
        print(
            f"{'FAULT ' if fault else 'ok    '} {line}{f': {fault}' if fault else ''}", flush=True
        )

    def kill_until_finished(self, name: str, kills: int) -> Counter[str]:
        """Interrupt a run at most so many times, let it finish, and count the signals."""
        counts: Counter[str] = Counter()
        directory = self.folder / name
        for number in range(kills + 1):
            (process,) = self.start_all(name, ranks=1)
            if number < kills:
                chosen = self.random.choice(list(SIGNALS))
                self.wait(process, directory, self.random.random())
                process.send_signal(chosen)
            _, said = process.communicate(timeout=HUNG)
            code = process.returncode
            if code == 0:
                break
            # Before Python handles signals, the system ends the process.
            if number == kills or code not in (SIGNALS[chosen], -chosen):
                self.said(f"{name}, start {number + 1}", f"exit code {code}: {said}")
                return counts
            counts[chosen.name] += 1
        # The last signal may have come too late for the report.
        if not (directory / "report.md").exists():
            (process,) = self.start_all(name, ranks=1)
            process.communicate(timeout=HUNG)
        by = ", ".join(f"{count} {signal}" for signal, count in sorted(counts.items())) or "nothing"
        self.said(f"{name}, interrupted by {by}", self.difference(directory, self.whole))
        return counts

    def wait(self, process: subprocess.Popen[str], directory: Path, share: float) -> None:
        """Wait until a run has made about this share of its remaining updates."""
        before = len(steps_in(directory))
        wanted = before + int(share * (UPDATES + 6 - before))
        pause = self.random.random() * 0.2
        while process.poll() is None and len(steps_in(directory)) < wanted:
            try:
                process.wait(pause + 0.01)
            except subprocess.TimeoutExpired:
                continue
        if share < 0.2:  # while importing, reading, packing
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.random.random() * 5)

    def difference(self, directory: Path, whole: Path) -> str | None:
        """Return how a finished run differs from the uninterrupted one."""
        for name in (f"checkpoint{UPDATES}", "best_checkpoint"):
            found, wanted = checkpoint_tree(directory / name), checkpoint_tree(whole / name)
            if found != wanted:
                differing = [file for file in wanted if found.get(file) != wanted[file]]
                return f"{name} differs in {differing or 'its list of files'}"
        if validations(directory) != validations(whole):
            return "the validations differ"
        for name in ("report.md", *(["hf/model.safetensors"] if (whole / "hf").exists() else [])):
            if not (directory / name).exists():
                return f"there is no {name}"
        left = [path.name for path in directory.iterdir() if path.name.startswith((".tmp", ".old"))]
        return f"left-over files: {left}" if left else None

    def fill_disk(self) -> None:
        """Limit files to half the size of the weights; then lift the limit."""
        directory = self.folder / "full"
        limit = (self.whole / f"checkpoint{UPDATES}" / "model.safetensors").stat().st_size // 2
        process = self.start(self.config("full"), limit=limit)
        _, said = process.communicate(timeout=HUNG)
        fault = None if process.returncode == 6 else f"exit code {process.returncode}: {said}"
        self.said("a disk that is full, at the first checkpoint", fault)
        process = self.start(self.config("full", total_updates=10, end_learning_rate=0.0,
                                         **self.how(directory)))  # fmt: skip
        process.communicate(timeout=HUNG)
        process = self.start(self.config("full", resume=True), limit=limit)
        _, said = process.communicate(timeout=HUNG)
        fault = None if process.returncode == 6 else f"exit code {process.returncode}: {said}"
        self.said("a disk that is full, at a later checkpoint", fault)
        process = self.start(self.config("full", resume=True))
        _, said = process.communicate(timeout=HUNG)
        fault = None if process.returncode == 0 else f"exit code {process.returncode}: {said}"
        self.said("freed again, and resumed", fault)

    def lose_rank(self) -> None:
        """Kill one of two ranks; then resume both."""
        whole = self.run_whole("two whole", ranks=2)
        victim = self.random.randrange(2)
        processes = self.start_all("two", ranks=2)
        self.wait(processes[0], self.folder / "two", self.random.uniform(0.4, 0.8))
        processes[victim].kill()
        codes = []
        for process in processes:
            process.communicate(timeout=HUNG)
            codes.append(process.returncode)
        fault = f"exit codes {codes}" if 0 in codes else None
        self.said(f"rank {victim} of two killed: exit codes {codes}", fault)
        resumed = self.start_all("two", ranks=2)
        said = [process.communicate(timeout=HUNG)[1][-300:] for process in resumed]
        codes = [process.returncode for process in resumed]
        fault = f"exit codes {codes}: {said}" if any(codes) else None
        self.said("both ranks resumed", fault or self.difference(self.folder / "two", whole))

    def resume_twice(self) -> None:
        """Resume an interrupted run in two processes at the same time, then the finished run."""
        directory = self.folder / "twice"
        (process,) = self.start_all("twice", ranks=1)
        self.wait(process, directory, 0.6)
        process.kill()
        process.communicate(timeout=HUNG)
        both = [process for _ in range(2) for process in self.start_all("twice", ranks=1)]
        codes = []
        for process in both:
            process.communicate(timeout=HUNG)
            codes.append(process.returncode)
        # The second may start after the first has finished.
        fault = None if sorted(codes) in ([0, 4], [0, 0]) else f"exit codes {codes}"
        self.said("two resumes at once", fault or self.difference(directory, self.whole))
        before = tree(directory)
        (process,) = self.start_all("twice", ranks=1)
        process.communicate(timeout=HUNG)
        changed_files = [name for name, each in tree(directory).items() if before.get(name) != each]
        self.said(
            "a resume of the finished run", f"changed {changed_files}" if changed_files else None
        )


def steps_in(directory: Path) -> list[bytes]:
    """Return the lines of metrics so far."""
    file = directory / "metrics.jsonl"
    return file.read_bytes().splitlines() if file.exists() else []


def validations(directory: Path) -> list[dict[str, float]]:
    """Return the metrics of evaluations, which do not depend on time."""
    records = [json.loads(line) for line in steps_in(directory)]
    return [record for record in records if "valid/bits" in record]


def main(arguments: list[str]) -> int:
    """Run everything; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--at-most", type=int, default=8, help="kills per run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only-kills", action="store_true")
    given = parser.parse_args(arguments)
    for number in SIGNALS:
        # A run ignores what was ignored at its start, as under nohup; nothing would interrupt it.
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        chaos = Chaos(folder, given.seed)
        counts: Counter[str] = Counter()
        run = 0
        while counts.total() < given.kills and not chaos.failures:
            run += 1
            left = given.kills - counts.total()
            counts += chaos.kill_until_finished(f"run {run}", min(left, given.at_most))
        by = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        print(f"{counts.total()} interruptions of {run} runs ({by})", flush=True)
        if not given.only_kills:
            chaos.fill_disk()
            chaos.lose_rank()
            chaos.resume_twice()
        print(f"{chaos.failures} faults")
        return int(chaos.failures > 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
