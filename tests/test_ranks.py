"""Whole runs on two ranks, by the command: stop, resume, move, break."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore

from annotated_mpnet.checkpoints.checkpoint import load_checkpoint
from annotated_mpnet.checkpoints.retention import newest_first
from annotated_mpnet.errors import ConfigError
from annotated_mpnet.runs.run import MAY_DIFFER, _refuse_different_settings
from annotated_mpnet.settings.config import PretrainingConfig
from folders import TENSORS, names_in, tensors_of, tree
from ranks import Started, arguments_of, open_store, run_ranks
from tiny_run import TinyText, changed, run, tiny_config, write_dataset
from waiting import HUNG, holds, wait_for

ENDLESS = 100_000
"""Updates of a run that a test ends: it must not be complete before, however slow the test is."""


def config_of(text: TinyText, directory: Path) -> PretrainingConfig:
    """One micro-batch of 4 sequences on each of two ranks, where one process has two."""
    return changed(
        tiny_config(text, directory), update_freq=1, checkpoint_interval=4, export_hf=False
    )


def without_dropout(config: PretrainingConfig) -> PretrainingConfig:
    return changed(config, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)


def on_one(config: PretrainingConfig) -> PretrainingConfig:
    return changed(config, update_freq=2)


def curve(directory: Path) -> list[tuple[int, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = ("train/loss", "valid/bits")
    return [(each["step"], each[name]) for each in records for name in names if name in each]


def assert_close(one: Path, other: Path) -> None:
    for name in TENSORS:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            difference = (first[key] - second[key]).abs().max().item()
            assert difference < 1e-5, (key, difference)


def test_two_ranks_train_as_one_process_and_write_what_it_writes(
    text: TinyText, tmp_path: Path
) -> None:
    config = without_dropout(config_of(text, tmp_path / "two"))
    run_ranks(changed(config, export_hf=True))
    run(on_one(changed(config, export_hf=True, checkpoint_dir=tmp_path / "one")))
    assert tree(tmp_path / "two").keys() == tree(tmp_path / "one").keys()
    for (step, loss), (same_step, same_loss) in zip(
        curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True
    ):
        assert step == same_step
        assert loss == pytest.approx(same_loss, abs=1e-5)
    assert_close(tmp_path / "two" / "checkpoint8", tmp_path / "one" / "checkpoint8")


def test_only_rank_0_writes(text: TinyText, tmp_path: Path) -> None:
    # On another machine, a directory of the same name is another directory.
    config = changed(config_of(text, tmp_path / "run"), total_updates=4, export_hf=True)
    elsewhere = changed(config, checkpoint_dir=tmp_path / "rank 1")
    endings = Started(config, 2, elsewhere).endings()
    assert [code for code, _, _ in endings] == [0, 0], endings
    assert {"checkpoint4", "report.md", "hf"} <= names_in(tmp_path / "run")
    assert not (tmp_path / "rank 1").exists()


@pytest.mark.parametrize(
    "machine",
    [{"fsdp": False}, {"fsdp": True, "gradient_checkpointing": True, "precision": "bf16"}],
    ids=["ddp", "fsdp, checkpointed, in bfloat16"],
)
def test_two_ranks_resume_byte_for_byte(
    text: TinyText, tmp_path: Path, machine: dict[str, object]
) -> None:
    # The same command both times: rank 0 looks whether there is a run, and tells the others.
    config = changed(config_of(text, tmp_path / "run"), autoresume=True, **machine)
    assert "so one is started" in run_ranks(config)
    whole = tensors_of(tmp_path / "run" / "checkpoint8")
    for name in ("checkpoint8", "best_checkpoint"):
        shutil.rmtree(tmp_path / "run" / name)
    said = run_ranks(config)
    assert "--autoresume: there is a run in" in said
    assert "after update 4" in said
    assert tensors_of(tmp_path / "run" / "checkpoint8") == whole


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_gradient_checkpointing_changes_no_byte_on_two_ranks(
    text: TinyText, tmp_path: Path, fsdp: bool
) -> None:
    # With dropout, and two micro-batches, of which only the last is synchronised.
    config = changed(config_of(text, tmp_path / "once"), fsdp=fsdp, update_freq=2, total_updates=4)
    run_ranks(config)
    twice = {"checkpoint_dir": tmp_path / "twice", "gradient_checkpointing": True}
    run_ranks(changed(config, **twice))
    ends = [tensors_of(tmp_path / name / "checkpoint4") for name in ("once", "twice")]
    assert ends[0] == ends[1]


def test_a_run_moves_from_two_ranks_to_one_and_back(text: TinyText, tmp_path: Path) -> None:
    config = without_dropout(config_of(text, tmp_path / "run"))
    run_ranks(config)
    expected = tmp_path / "expected"
    (tmp_path / "run" / "checkpoint8").rename(expected)
    run(on_one(changed(config, resume_checkpoint=tmp_path / "run" / "checkpoint4")))
    assert_close(tmp_path / "run" / "checkpoint8", expected)
    # And to shards, from a checkpoint that one process wrote.
    run(on_one(changed(config, checkpoint_dir=tmp_path / "alone")))
    shutil.rmtree(tmp_path / "alone" / "checkpoint8")
    elsewhere = changed(config, checkpoint_dir=tmp_path / "alone", fsdp=True)
    run_ranks(changed(elsewhere, resume_checkpoint=tmp_path / "alone" / "checkpoint4"))
    assert_close(tmp_path / "alone" / "checkpoint8", expected)


def test_another_global_batch_is_refused_by_all_ranks_and_explained_once(
    text: TinyText, tmp_path: Path
) -> None:
    config = config_of(text, tmp_path / "run")
    run_ranks(changed(config, total_updates=4))
    wrong = changed(config, update_freq=2, resume=True)
    endings = Started(wrong).endings()
    assert [code for code, _, _ in endings] == [4, 4]
    assert "batch was 8 and is 16" in endings[0][2]
    assert endings[1][2].strip() == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_one_checkpoint(
    text: TinyText, tmp_path: Path, rank: int
) -> None:
    config = changed(
        config_of(text, tmp_path / "run"), total_updates=ENDLESS, checkpoint_interval=-1
    )
    started = Started(config)
    wait_for(holds(tmp_path / "run" / "metrics.jsonl", '"step": 6'), *started.processes)
    started.processes[rank].send_signal(signal.SIGTERM)
    endings = started.endings()
    assert [code for code, _, _ in endings] == [143, 143], endings
    numbered = list((tmp_path / "run").glob("checkpoint*"))
    assert len(numbered) == 1, numbered


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_itself_stops_the_run_after_one_checkpoint(
    text: TinyText, tmp_path: Path, number: signal.Signals
) -> None:
    config = changed(
        config_of(text, tmp_path / "run"), total_updates=ENDLESS, checkpoint_interval=-1
    )
    # torchrun by the name that it has as a module; standalone, to take a port that is free.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "--standalone", "-m", "annotated_mpnet", *arguments_of(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # It kills ranks that take longer to stop, by default than 30 seconds.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(HUNG),
        },
    )
    try:
        wait_for(holds(tmp_path / "run" / "metrics.jsonl", '"step": 6'), process)
        process.send_signal(number)
        said, complained = process.communicate(timeout=HUNG)
    finally:
        process.kill()
    # torchrun prints its own message and exits with 1, as docs/guide/gpus.md says.
    assert process.returncode == 1
    assert complained.count(f"pretrain-mpnet: stopped by {number.name}\n") == 1
    (saved,) = (tmp_path / "run").glob("checkpoint*")
    update = load_checkpoint(saved).state.update
    assert f"saved after update {update}; continue with --resume" in said


def test_a_run_with_a_killed_rank_ends_and_resumes_as_the_same_run(
    text: TinyText, tmp_path: Path
) -> None:
    # At a constant rate, so a run that ends earlier is the same run.
    config = changed(
        config_of(text, tmp_path / "run"),
        total_updates=ENDLESS,
        end_learning_rate=1e-3,
        warmup_updates=0,
    )
    started = Started(config)
    wait_for(holds(tmp_path / "run" / "metrics.jsonl", '"step": 6'), *started.processes)
    started.processes[1].kill()
    # Not only after --distributed-timeout: `endings` does not wait for so long.
    assert config.machine.distributed_timeout > HUNG
    code, _, complained = started.endings()[0]
    assert code == 1
    assert "lost the others" in complained
    assert "Traceback" not in complained
    newest, *_ = newest_first(tmp_path / "run")
    end = load_checkpoint(newest).state.update + 2
    run_ranks(changed(config, total_updates=end, resume=True))
    run_ranks(changed(config, total_updates=end, checkpoint_dir=tmp_path / "whole"))
    ends = [tensors_of(tmp_path / name / f"checkpoint{end}") for name in ("run", "whole")]
    assert ends[0] == ends[1]


def test_a_checkpoint_that_cannot_be_written_stops_all_ranks_and_one_says_why(
    text: TinyText, tmp_path: Path
) -> None:
    config = changed(config_of(text, tmp_path / "run"), total_updates=2000, valid_file=None)
    run_ranks(changed(config, total_updates=4, checkpoint_dir=tmp_path / "first"))
    sizes = [(tmp_path / "first" / "checkpoint4" / name).stat().st_size for name in TENSORS]
    # The network can be written, but AdamW's means, twice as large, cannot.
    endings = Started(config, limit=sum(sizes) // 2).endings()
    assert [code for code, _, _ in endings] == [6, 6], endings
    assert "could not be written: File too large" in endings[0][2]
    assert "Traceback" not in endings[0][2]
    assert endings[1][2].strip() == ""
    assert list((tmp_path / "run").glob("*checkpoint*")) == []


@pytest.fixture(scope="module")
def dataset(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(text, tmp_path_factory.mktemp("dataset"), shards=4)


def stream_config(text: TinyText, dataset: Path, directory: Path) -> PretrainingConfig:
    return changed(
        config_of(text, directory),
        train_dir=None,
        test_file=None,
        dataset_name=str(dataset),
        buffer_size=20,
        eval_samples=0,
        min_text_length=20,
        total_updates=16,
        checkpoint_interval=8,
    )


def test_a_stream_on_two_ranks_resumes_byte_for_byte_and_moves_only_when_allowed(
    text: TinyText, dataset: Path, tmp_path: Path
) -> None:
    config = stream_config(text, dataset, tmp_path / "run")
    run_ranks(config)
    whole = tensors_of(tmp_path / "run" / "checkpoint16")
    shutil.rmtree(tmp_path / "run" / "checkpoint16")
    again = changed(config, resume_checkpoint=tmp_path / "run" / "checkpoint8")
    run_ranks(again)
    assert tensors_of(tmp_path / "run" / "checkpoint16") == whole

    shutil.rmtree(tmp_path / "run" / "checkpoint16")
    moved = on_one(again)
    (code, _, complained) = Started(moved, size=1).endings()[0]
    assert code == 4
    assert "world-size was 2 and is 1" in complained
    _, said = run(changed(moved, allow_change="world-size"))
    assert "world-size was 2 and is 1" in said
    assert (tmp_path / "run" / "checkpoint16").exists()


def test_text_that_breaks_off_on_one_rank_stops_all_after_a_checkpoint(
    text: TinyText, dataset: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    shard = broken / "train-00002.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(lines[: len(lines) // 2]) + '{"text": "breaks off')
    config = changed(
        stream_config(text, broken, tmp_path / "run"), buffer_size=4, total_updates=2000
    )
    endings = Started(config).endings()
    assert [code for code, _, _ in endings] == [3, 3], endings
    said = [complained for _, _, complained in endings if complained.strip()]
    assert len(said) == 1, endings
    assert "train-00002.jsonl" in said[0] or "JSON" in said[0]
    assert list((tmp_path / "run").glob("checkpoint*")), "what was trained was not kept"


def test_ranks_with_other_settings_are_refused_by_name(text: TinyText, tmp_path: Path) -> None:
    config = config_of(text, tmp_path / "run")
    endings = Started(config, 2, changed(config, lr=0.5)).endings()
    assert [code for code, _, _ in endings] == [2, 2]
    (line,) = "".join(errors for _, _, errors in endings).splitlines()
    assert "differ in --lr: " in line
    assert not (tmp_path / "run").exists()


class TwoRanks:
    """What `gather_objects` of two ranks returns on rank 0."""

    rank = 0

    def __init__(self, other: PretrainingConfig) -> None:
        self.other = other

    def gather_objects(self, own: dict[str, object]) -> list[dict[str, object]]:
        return [own, {name: getattr_of(self.other, name, own) for name in own}]


def getattr_of(config: PretrainingConfig, name: str, own: dict[str, object]) -> object:
    (value,) = [vars(group)[name] for group in vars(config).values() if name in vars(group)]
    return value if name not in MAY_DIFFER else value is not None


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"lr": 0.5}, "--lr"),
        ({"dropout": 0.0}, "--dropout"),
        ({"weight_decay": 0.0}, "--weight-decay"),
        ({"precision": "bf16"}, "--precision"),
        ({"resume": True}, "--resume"),
        ({"valid_file": None}, "--valid-file"),
        ({"eval_interval_steps": 3}, "--eval-interval-steps"),
        ({"checkpoint_interval": 3}, "--checkpoint-interval"),
        ({"packing": "none"}, "--packing"),
        ({"schedule": "cosine"}, "--schedule"),
        ({"num_workers": 3, "checkpoint_dir": Path("elsewhere"), "wandb_name": "x"}, None),
    ],
)
def test_all_settings_that_decide_an_update_are_compared_over_ranks(
    text: TinyText, tmp_path: Path, changes: dict[str, object], flag: str | None
) -> None:
    config = changed(config_of(text, tmp_path / "run"), wandb_name="y")
    world = TwoRanks(changed(config, **changes))
    if flag is None:
        _refuse_different_settings(config, world)  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=f"rank 1 and rank 0 differ in {flag}: "):
        _refuse_different_settings(config, world)  # type: ignore[arg-type]


def agents(config: PretrainingConfig, store: TCPStore) -> list[subprocess.Popen[str]]:
    """Start one rank on each of two machines, which are this one: an agent of torchrun for each.

    They meet at the test's own store: a port that is free now may be taken by the time they start.
    """
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--nproc-per-node", "1", "--max-restarts", "0", "--rdzv-id", "run"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}"),
                *("--rdzv-conf", "is_host=false"),
                *("-m", "annotated_mpnet", *arguments_of(config)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]


def test_two_agents_train_lose_one_and_resume_to_the_same_bytes(
    text: TinyText, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def finished(config: PretrainingConfig) -> None:
        store = open_store()
        both = agents(config, store)
        said = [agent.communicate(timeout=HUNG) for agent in both]
        assert [agent.returncode for agent in both] == [0, 0], said

    # A constant rate, so the run may end at any update and be the same run.
    config = changed(
        config_of(text, tmp_path / "run"),
        total_updates=ENDLESS,
        end_learning_rate=1e-3,
        checkpoint_interval=2,
        keep_checkpoints=2,
    )
    store = open_store()
    both = agents(config, store)
    for agent in both:
        request.addfinalizer(agent.kill)
    wait_for(lambda: bool(newest_first(tmp_path / "run")), *both)
    # Its rank ends with it.
    both[1].kill()
    both[1].communicate(timeout=HUNG)
    both[0].communicate(timeout=HUNG)
    assert both[0].returncode != 0
    (last, *_) = newest_first(tmp_path / "run")
    end = load_checkpoint(last).state.update + 2
    finished(changed(config, total_updates=end, resume=True))
    run_ranks(changed(config, total_updates=end, checkpoint_dir=tmp_path / "whole"))
    ends = [tensors_of(tmp_path / name / f"checkpoint{end}") for name in ("run", "whole")]
    assert ends[0] == ends[1]
