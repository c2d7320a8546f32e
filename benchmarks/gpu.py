"""Check a GPU in one command: correctness, reproducibility, speed.

    python benchmarks/gpu.py [--minutes 6] [--text DIRECTORY --tokenizer DIRECTORY] [--json FILE]
    python benchmarks/gpu.py --rehearse --text DIRECTORY --tokenizer DIRECTORY

With --rehearse every step runs on a CPU, in tiny shapes.

1. **Right**: the kernels agree with the formula on this card, in float32 and bfloat16, and give
   the same gradients twice.
2. **Same**: two runs of the preset demo, and one that is resumed half-way, end in the same
   bytes of `model.safetensors`.
3. **Fast**: MPNet-base at several batch sizes, compiled or not, recorded or not, compared with the
   paper's form and transformers at the same batch. The contestants start at the same time, to
   compile their kernels in parallel, and then run in turn. Then attention alone.
4. **A run** of the preset small, for its curve, if `--text` and `--tokenizer` are given.

A step that fails or takes too long is reported, and the others still run. Exit code 2 without a
GPU, 1 if anything failed.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from annotated_mpnet.fast.kernel_check import kernel_fault
from annotated_mpnet.training.throughput import device_name, peak_flops, training_flops
from common import SHAPES, machine, model_config, num_predicted, write_json
from contestants import Worker, mode_of

CONVENTION = (
    "milliseconds of an update of one micro-batch of full sequences (ours: recorded as a CUDA "
    "graph and clipped; others: forward, backward, AdamW), median over the rounds of contestants "
    "in turn; tokens are input tokens; TFLOP/s by annotated_mpnet/training/throughput.py"
)

COMPILED = ["--compile"]
CONTESTANTS: dict[str, tuple[str, list[str]]] = {
    "batch 16": ("ours", ["--batch", "16", *COMPILED]),
    "batch 32": ("ours", ["--batch", "32", *COMPILED]),
    "batch 96": ("ours", ["--batch", "96", *COMPILED]),
    "batch 32, dropout 0.1": ("ours", ["--batch", "32", *COMPILED, "--dropout", "0.1"]),
    "batch 32, not compiled": ("ours", ["--batch", "32"]),
    "batch 32, not recorded": ("ours", ["--batch", "32", *COMPILED, "--not-recorded"]),
    "batch 32, sdpa": ("ours", ["--batch", "32", *COMPILED, "--attention", "sdpa"]),
    "batch 32, mlm": ("ours-mlm", ["--batch", "32", *COMPILED]),
    "batch 16, the paper's form": ("permuted", ["--batch", "16"]),
    "batch 16, transformers' MLM": ("hf", ["--batch", "16"]),
}
"""Label -> contestant and its flags, for MPNet-base with sequences of 512 tokens. All together need
about 120 GB."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="time limit for all steps")
    parser.add_argument("--text", type=Path, help="directory of text files for the run")
    parser.add_argument("--tokenizer", type=Path, help="directory of its tokenizer")
    parser.add_argument("--updates", type=int, default=600, help="updates of the run")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, in tiny shapes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.rehearse or arguments.text) and None in (arguments.text, arguments.tokenizer):
        parser.error("expected both --text and --tokenizer, for a run or with --rehearse")
    if not torch.cuda.is_available() and not arguments.rehearse:
        print("no CUDA GPU found; --rehearse runs every step on a CPU", file=sys.stderr)
        return 2
    session = Measurements(arguments)
    with tempfile.TemporaryDirectory() as directory:
        session.run(Path(directory))
    write_json("gpu", arguments, session.device, CONVENTION, session.results)
    for failure in session.failures:
        print(f"FAILED: {failure}")
    return 1 if session.failures else 0


TINY_RUN = ["--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-dim", "16"]
TINY_RUN += ["--encoder-attention-heads", "2", "--max-tokens", "16", "--batch-size", "2"]
TINY_RUN += ["--valid-fraction", "0.2"]

PACKAGES = [each for each in sys.path if each and Path(each) != Path(__file__).parent]
"""The import path without this folder, whose `profile.py` would hide Python's module."""


class Measurements:
    """Runs the steps and keeps their results and failures."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rehearse: bool = arguments.rehearse
        self.device = torch.device("cpu" if self.rehearse else "cuda")
        self.started = time.perf_counter()
        self.results: dict[str, object] = {}
        self.failures: list[str] = []

    def run(self, directory: Path) -> None:
        """Run all steps."""
        print(machine(self.device))
        # While contestants compile, only steps without timing run.
        workers: dict[str, Worker] = {}
        starting = [
            threading.Thread(target=self._start, args=(label, workers))
            for label in self._contestants()
        ]
        for thread in starting:
            thread.start()
        self._step("right", self._check_kernels)
        self._step("same", lambda: self._check_bytes(directory))
        for thread in starting:
            thread.join()
        self._step("fast", lambda: self._measure(workers))
        self._step("attention", lambda: self._measure_attention(directory))
        if self.arguments.text is not None:
            self._step("run", lambda: self._train(directory))

    def _step(self, name: str, step: Callable[[], object]) -> None:
        try:
            self.results[name] = step()
        except Exception as error:  # the other steps still run
            self.failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
        print(f"-- {name}: {time.perf_counter() - self.started:.0f} s so far", flush=True)

    def _left(self) -> float:
        """Return the remaining seconds."""
        spent = time.perf_counter() - self.started
        return max(1.0, 60 * self.arguments.minutes - spent)

    # 1. Right

    def _check_kernels(self) -> object:
        found = {}
        shape = SHAPES["demo" if self.rehearse else "base"]
        for name, bf16 in (("fp32", False), ("bf16", True)):
            if self.rehearse:
                found[name] = "not checked on a CPU"
                continue
            fault = kernel_fault(model_config(shape, 0.0), self.device, bf16)
            found[name] = fault or "agree with the formula"
            if fault is not None:
                self.failures.append(f"kernels in {name}: {fault}")
        for name, result in found.items():
            print(f"kernels, {name}: {result}")
        return found

    # 2. Same

    def _check_bytes(self, directory: Path) -> object:
        """Compare two runs and a resumed one."""
        updates = 4 if self.rehearse else 60
        flags = [*TINY_RUN, *self._text()] if self.rehearse else ["--preset", "demo"]
        flags += ["--device", self.device.type, "--no-export-hf", "--keep-checkpoints", "-1"]
        flags += ["--warmup-updates", "2", "--total-updates", str(updates)]
        flags += ["--checkpoint-interval", str(updates // 2), "--eval-interval-steps", "1000"]
        folders = {name: directory / name for name in ("first", "second", "resumed")}
        self._wait_for(folders["first"], self._pretrain(folders["first"], *flags))
        for name in ("second", "resumed"):
            shutil.copytree(folders["first"], folders[name])
        shutil.rmtree(folders["second"] / "run")
        # Back to half of the updates, as if the run had been killed there.
        for what in (f"checkpoint{updates}", "best_checkpoint"):
            shutil.rmtree(folders["resumed"] / "run" / what)
        second = self._pretrain(folders["second"], *flags)
        resumed = self._pretrain(folders["resumed"], *flags, "--resume")
        self._wait_for(folders["second"], second)
        self._wait_for(folders["resumed"], resumed)
        last = f"run/checkpoint{updates}/model.safetensors"
        digests = {
            name: hashlib.sha256((folder / last).read_bytes()).hexdigest()
            for name, folder in folders.items()
        }
        if len(set(digests.values())) > 1:
            self.failures.append(f"runs differ: {digests}")
        print(f"two runs and a resumed one: {len(set(digests.values()))} different results")
        return digests

    def _text(self) -> list[str]:
        text, tokenizer = self.arguments.text.resolve(), self.arguments.tokenizer.resolve()
        return ["--train-dir", str(text), "--tokenizer-name", str(tokenizer)]

    def _pretrain(self, folder: Path, *flags: str) -> "subprocess.Popen[str]":
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "annotated_mpnet", "--checkpoint-dir", "run", *flags]
        with (folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES)},
            )  # fmt: skip

    def _wait_for(self, folder: Path, run: "subprocess.Popen[str]") -> None:
        try:
            code = run.wait(timeout=self._left())
        finally:
            run.kill()
        if code != 0:
            lines = (folder / "output.txt").read_text().strip().splitlines()
            last = lines[-1] if lines else ""
            raise RuntimeError(f"{folder.name} failed with exit code {code}: {last}")

    # 3. Fast

    def _contestants(self) -> dict[str, tuple[str, list[str]]]:
        if not self.rehearse:
            common = ["--shape", "base", "--precision", "bf16", "--dropout", "0"]
            return {label: (name, common + flags) for label, (name, flags) in CONTESTANTS.items()}
        tiny = ["--shape", "demo", "--layers", "1", "--width", "16", "--length", "16"]
        tiny += ["--batch", "2", "--device", "cpu"]
        return {label: (CONTESTANTS[label][0], tiny) for label in list(CONTESTANTS)[-2:]}

    def _start(self, label: str, workers: dict[str, Worker]) -> None:
        name, flags = self._contestants()[label]
        script = str(Path(__file__).with_name("throughput.py"))
        try:
            workers[label] = Worker(name, [*flags, "--steps", "4"], script)
        except SystemExit as error:
            self.failures.append(f"{label}: {error}")

    def _measure(self, workers: dict[str, Worker]) -> object:
        order = [label for label in self._contestants() if label in workers]
        for _ in range(self.arguments.rounds):
            for label in order:
                workers[label].take_a_turn()
        for label in order:
            workers[label].end()
        found = {}
        print(
            f"{'':<28}{'ms':>8}{'lowest':>8}{'highest':>8}{'tokens/s':>10}{'TFLOP/s':>9}{'GB':>7}"
        )
        peak = None if self.rehearse else peak_flops(device_name(self.device), True)
        for label in order:
            name, flags = self._contestants()[label]
            shape = SHAPES[flags[flags.index("--shape") + 1]]
            batch = int(flags[flags.index("--batch") + 1])
            length = 16 if self.rehearse else shape.length
            seconds = workers[label].seconds
            median = statistics.median(seconds)
            predicted = num_predicted(length)
            flops = training_flops(
                model_config(shape, 0.0), mode_of(name), batch, length, predicted
            )
            # The FLOPs are those of our form; the others compute more, or something else.
            rate = flops / median / 1e12 if name.startswith("ours") else None
            found[label] = {
                "seconds": seconds,
                "median": median,
                "tokens_per_second": batch * length / median,
                "tflops": rate,
                "mfu": None if rate is None or peak is None else 1e12 * rate / peak,
                "memory_gb": workers[label].memory_gb,
            }
            print(
                f"{label:<28}{1e3 * median:>8.2f}{1e3 * min(seconds):>8.2f}"
                f"{1e3 * max(seconds):>8.2f}{batch * length / median:>10,.0f}"
                f"{'' if rate is None else f'{rate:.0f}':>9}{workers[label].memory_gb:>7.2f}"
            )
        return found

    def _measure_attention(self, directory: Path) -> object:
        """Compare attention implementations with `attention.py`."""
        file = directory / "attention.json"
        flags = ["--with", "eager", "sdpa", "triton", "--batch", "32", "--rounds", "5"]
        if self.rehearse:
            flags = ["--with", "eager", "sdpa", "--batch", "1", "--rounds", "1"]
            flags += ["--shape", "demo", "--length", "16", "--device", "cpu"]
        script = str(Path(__file__).with_name("attention.py"))
        done = subprocess.run(
            [sys.executable, script, *flags, "--json", str(file)],
            capture_output=True, text=True, check=False, timeout=min(60, self._left()),
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        print(done.stdout.strip())
        return json.loads(file.read_text())["results"]

    # 4. A run

    def _train(self, directory: Path) -> object:
        """Train the preset small; return its metrics."""
        updates = self.arguments.updates
        flags = [*(TINY_RUN if self.rehearse else ["--preset", "small"]), *self._text()]
        flags += ["--device", self.device.type, "--total-updates", str(updates)]
        flags += ["--warmup-updates", str(updates // 10), "--no-export-hf"]
        flags += ["--eval-interval-steps", str(updates // 4), "--checkpoint-interval", "1000000"]
        folder = directory / "small"
        self._wait_for(folder, self._pretrain(folder, *flags))
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        curve = [json.loads(line) for line in lines]
        for line in curve:
            if "valid/bits" in line:
                bits, accuracy = line["valid/bits"], line["valid/accuracy"]
                print(f"update {line['step']:>6}: {bits:.2f} bits, accuracy {accuracy:.3f}")
        return curve


if __name__ == "__main__":
    sys.exit(main())
