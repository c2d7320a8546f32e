"""The examples for operators: a Slurm job that is requeued, and a Dockerfile."""

import os
import re
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from annotated_mpnet.settings.parsing import parse_pretrain
from waiting import HUNG, holds, wait_for

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "examples" / "slurm.sh"
FAKES = {
    "srun": 'exec "$@"',
    "scontrol": '[[ $1 == show ]] && echo node7 || echo "$*" >> "$HERE/requeued"',
    # Trains until it is stopped, then saves for a moment.
    "torchrun": (
        'trap "sleep 0.1; echo saved >> $HERE/saved; exit 1" TERM; echo "$*" >> "$HERE/started"; '
        "[[ $* == *--no-export-hf* ]] && exit 3; while true; do sleep 0.05; done"
    ),
}
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Put fakes of Slurm and torchrun on the path; return a job's environment."""
    for name, script in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path)}
    return {**os.environ, **here, **JOB, "SLURM_GPUS_ON_NODE": "4"}


def commands_in(script: Path) -> str:
    """Return the commands in a script's comments, as one line."""
    return re.sub(r"\s*\\\n#\s*", " ", script.read_text())


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
def test_a_slurm_job_that_is_stopped_saves_and_is_requeued(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    job = subprocess.Popen(["bash", str(SLURM), "--preset", "base"], env=cluster)
    wait_for(holds(tmp_path / "started", "\n"), job)
    assert (tmp_path / "started").read_text() == (
        "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id 77 --rdzv-endpoint "
        "node7:20077 -m annotated_mpnet --autoresume --preset base\n"
    )
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=HUNG) == 1
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


@needs_bash
def test_a_slurm_job_that_fails_is_not_requeued(cluster: dict[str, str], tmp_path: Path) -> None:
    job = ["bash", str(SLURM), "--no-export-hf"]
    assert subprocess.run(job, env=cluster, timeout=HUNG).returncode == 3
    assert not (tmp_path / "requeued").exists()
    # Without Slurm the same script runs on this machine.
    alone = {name: value for name, value in cluster.items() if not name.startswith("SLURM")}
    assert subprocess.run(job, env=alone, timeout=HUNG).returncode == 3
    last = (tmp_path / "started").read_text().splitlines()[-1]
    assert last.startswith("--standalone --nproc-per-node 1 -m annotated_mpnet --autoresume")


@pytest.mark.parametrize("name", ["slurm.sh", "Dockerfile"])
def test_the_command_in_the_comments_is_a_valid_one(name: str) -> None:
    said = commands_in(ROOT / "examples" / name)
    found = re.search(r"(?:slurm\.sh|annotated-mpnet) (--preset base --train-dir .*)", said)
    assert found
    command = parse_pretrain(found[1].split())
    command.settings.validate()
    assert command.settings.run.checkpoint_interval > 0


def test_the_image_copies_what_an_installation_needs_and_starts_a_command_of_ours() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "examples" / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    assert copied >= {"pyproject.toml", "src", project["readme"], *project["license-files"]}
    assert all((ROOT / name).exists() for name in copied)
    assert f'ENTRYPOINT ["{next(iter(project["scripts"]))}"]' in lines
    (installed,) = re.findall(r"/source\[([\w,]+)\]", "\n".join(lines))
    assert set(installed.split(",")) <= project["optional-dependencies"].keys()
