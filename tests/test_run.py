"""Whole runs in one process: train, stop, resume, export."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMaskedLM, AutoTokenizer

from annotated_mpnet.checkpoints.checkpoint import load_checkpoint
from annotated_mpnet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    OutOfMemoryError,
)
from annotated_mpnet.mpnet.loop import Evaluation
from annotated_mpnet.mpnet.masking import count_predicted
from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from annotated_mpnet.runs.run import RunResult, run_pretraining
from annotated_mpnet.runs.session import Session
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.tracking import plateau
from annotated_mpnet.tracking.guesses import read_guesses
from annotated_mpnet.training.throughput import training_flops
from annotated_mpnet.training.trainer import Trainer
from folders import tensors_of, tree
from tiny_run import TinyText, changed, run, tiny_config


def rehearse(config: PretrainingConfig) -> tuple[RunResult | None, str]:
    said = io.StringIO()
    # Narrow but no terminal, so lines are not wrapped.
    console = Console(file=said, width=40)
    result = run_pretraining(config, console, dry_run=True, notes=["warm-up: shorter"])
    return result, said.getvalue()


def test_a_run_leaves_what_it_promises(text: TinyText, tmp_path: Path) -> None:
    result, said = run(tiny_config(text, tmp_path / "run"))
    directory = tmp_path / "run"
    assert {path.name for path in directory.iterdir() if not path.name.startswith(".")} == {
        "best_checkpoint",
        "checkpoint8",
        "config.toml",
        "environment.json",
        "guesses.jsonl",
        "hf",
        "log.txt",
        "loss.png",
        "metrics.jsonl",
        "report.md",
    }
    assert result.state.update == 8
    assert result.test is not None
    assert "unigram plateau" in said
    report = (directory / "report.md").read_text()
    assert f"test, the best model | | {result.test.bits:.3f}" in report
    assert "documents in 2 files" in report
    # Three words, guessed after updates 4 and 8.
    assert len(read_guesses(directory / "guesses.jsonl")) == 6
    assert "## Masked words" in report
    assert said.count("]") >= 6
    assert (directory / "log.txt").read_text().count("\n") >= said.count("\n")


def test_metrics_have_their_documented_names(text: TinyText, tmp_path: Path) -> None:
    run(tiny_config(text, tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    training = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in training] == [2, 4, 6, 8]
    assert set(training[0]) == {
        "step",
        "train/loss",
        "train/bits",
        "train/learning_rate",
        "train/gradient_norm",
        "perf/tokens_per_second",
        "perf/predicted_per_second",
        "perf/data_wait",
        "memory/peak_gb",
    }
    validation = [record for record in records if "valid/bits" in record]
    assert [record["step"] for record in validation] == [4, 8]
    assert all(0 <= record["valid/accuracy"] <= 1 for record in validation)
    assert training[0]["train/bits"] == pytest.approx(
        training[0]["train/loss"] / 0.693147, rel=1e-5
    )


def test_mfu_is_the_share_of_the_peak_for_full_sequences(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU has no known peak, so set one.
    monkeypatch.setattr("annotated_mpnet.training.metrics.peak_flops", lambda *_: 1e12)
    config = changed(tiny_config(text, tmp_path / "run"), total_updates=2, export_hf=False)
    run(config)
    line, *_ = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    network = load_checkpoint(tmp_path / "run" / "checkpoint2").model_config
    predicted = int(count_predicted(np.array(30), config.objective.pred_prob))
    work = training_flops(network, "mpnet", 4, 32, predicted)
    seconds = 4 * 32 / metrics["perf/tokens_per_second"]
    assert metrics["perf/mfu"] == pytest.approx(work / seconds / 1e12, rel=1e-3)


@pytest.mark.parametrize("interval", [3, 4, 1000])
def test_resumed_run_equals_uninterrupted_run(
    text: TinyText, tmp_path: Path, interval: int
) -> None:
    whole = tiny_config(text, tmp_path / "whole")
    run(changed(whole, total_updates=40))

    half = changed(
        tiny_config(text, tmp_path / "half"),
        total_updates=40,
        eval_interval_steps=interval,
        checkpoint_interval=20,
    )
    run(half)
    uninterrupted = tensors_of(tmp_path / "half" / "checkpoint40")
    shutil.rmtree(tmp_path / "half" / "checkpoint40")
    shutil.rmtree(tmp_path / "half" / "best_checkpoint")
    _, said = run(changed(half, resume=True))

    assert "after update 20" in said
    assert tensors_of(tmp_path / "half" / "checkpoint40") == uninterrupted
    assert tensors_of(tmp_path / "whole" / "checkpoint40") == uninterrupted


def test_more_updates_continue_a_finished_run(text: TinyText, tmp_path: Path) -> None:
    constant = {"warmup_updates": 0, "end_learning_rate": 1e-3}
    whole = changed(tiny_config(text, tmp_path / "whole"), total_updates=12, **constant)
    run(whole)
    part = changed(tiny_config(text, tmp_path / "part"), total_updates=6, **constant)
    run(part)
    _, said = run(changed(part, total_updates=12, resume=True))
    assert "total_updates was 6 and is 12" in said
    assert tensors_of(tmp_path / "part" / "checkpoint12") == tensors_of(
        tmp_path / "whole" / "checkpoint12"
    )


def test_a_wsd_run_extended_from_its_stable_part_is_the_longer_run(
    text: TinyText, tmp_path: Path
) -> None:
    def wsd(name: str, total: int, **changes: object) -> PretrainingConfig:
        config = tiny_config(text, tmp_path / name)
        return changed(config, schedule="wsd", decay_updates=2, total_updates=total, **changes)

    run(wsd("longer", 12))
    run(wsd("shorter", 8, checkpoint_interval=3))
    # The shorter run's decay began in update 7.
    run(wsd("extended", 12, resume_checkpoint=tmp_path / "shorter" / "checkpoint6"))
    tensors = [tensors_of(tmp_path / name / "checkpoint12") for name in ("longer", "extended")]
    assert tensors[0] == tensors[1]


def test_a_mixture_resumes_exactly_and_with_other_shares_not_at_all(
    text: TinyText, tmp_path: Path
) -> None:
    config = changed(
        tiny_config(text, tmp_path / "run"),
        train_dir=(text.train_dir / "a.txt", text.train_dir / "b.txt"),
        train_weights=(1.0, 3.0),
        checkpoint_interval=4,
        export_hf=False,
    )
    _, said = run(config)
    assert "training: 8 updates, 64 sequences, of which" in said
    assert f"  75.0% are from {text.train_dir / 'b.txt'}, " in said
    whole = tensors_of(tmp_path / "run" / "checkpoint8")
    shutil.rmtree(tmp_path / "run" / "checkpoint8")
    shutil.rmtree(tmp_path / "run" / "best_checkpoint")
    with pytest.raises(CheckpointError, match="data was"):
        run(changed(config, resume=True, train_weights=(1.0, 2.0)))
    run(changed(config, resume=True))
    assert tensors_of(tmp_path / "run" / "checkpoint8") == whole


def test_resuming_a_complete_run_changes_no_file(text: TinyText, tmp_path: Path) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(config)
    before = tree(tmp_path / "run")
    _, said = run(changed(config, resume=True))
    assert "is complete" in said
    assert tree(tmp_path / "run") == before


def test_one_command_starts_and_resumes(text: TinyText, tmp_path: Path) -> None:
    start = tmp_path / "run"
    start.mkdir()
    (start / "notes.txt").write_text("mine")
    config = changed(
        tiny_config(text, start), autoresume=True, checkpoint_interval=4, export_hf=False
    )
    _, said = run(config)
    assert said.startswith(f"--autoresume: no run in {start} yet, so one is started")
    assert (start / "notes.txt").read_text() == "mine"
    whole = tensors_of(start / "checkpoint8")
    guesses = (start / "guesses.jsonl").read_bytes()
    # Finished: nothing is trained or written.
    before = tree(start)
    _, said = run(config)
    assert said.startswith(f"--autoresume: there is a run in {start}, which is resumed")
    assert "is complete" in said
    assert tree(start) == before
    # Interrupted while its only checkpoint was being replaced.
    shutil.rmtree(start / "checkpoint8")
    shutil.rmtree(start / "best_checkpoint")
    (start / "checkpoint4").rename(start / ".old-checkpoint4")
    _, said = run(changed(config, hf_model_path="somewhere"))
    assert "--hf-model-path somewhere is ignored: a resumed run has its weights" in said
    assert "after update 4" in said
    assert tensors_of(start / "checkpoint8") == whole
    assert (start / "guesses.jsonl").read_bytes() == guesses
    # Damaged: a run that might be repaired is not started again.
    for path in start.glob("*checkpoint*"):
        (path / "model.safetensors").write_bytes(b"")
    before = tree(start)
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        run(config)
    assert tree(start) == before


def test_a_run_without_a_checkpoint_is_started_again_by_the_same_command(
    text: TinyText, tmp_path: Path
) -> None:
    start = tmp_path / "run"
    config = changed(
        tiny_config(text, start), autoresume=True, total_updates=4, export_hf=False, test_file=None
    )
    run(config)
    whole = tensors_of(start / "checkpoint4")
    # Nothing is deleted of a run with results, even if its checkpoints are gone.
    for name in ("checkpoint4", "best_checkpoint"):
        shutil.rmtree(start / name)
    before = tree(start)
    with pytest.raises(CheckpointError, match="finds no checkpoint"):
        run(config)
    assert tree(start) == before
    for name in ("report.md", "loss.png"):
        (start / name).unlink()
    _, said = run(config)
    assert "has no checkpoint yet, so it is started again from update 0" in said
    assert tensors_of(start / "checkpoint4") == whole


@pytest.mark.parametrize("missing", [("hf", "report.md"), ("hf",), ("report.md",)])
def test_resuming_a_complete_run_makes_what_is_missing(
    text: TinyText, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    config = tiny_config(text, tmp_path / "run")
    first, _ = run(config)
    before = tree(tmp_path / "run")
    for name in missing:
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    second, _ = run(changed(config, resume=True))
    assert (second.test, second.plateau) == (first.test, first.plateau)
    assert second.export == tmp_path / "run" / "hf"
    after = tree(tmp_path / "run")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {
        *("log.txt", "loss.png", "report.md", "environment.json", "config.toml")
    }
    for line in before["report.md"].decode().splitlines():
        if "bits" in line or "accuracy" in line:
            assert line in after["report.md"].decode()
    assert "is complete" in run(changed(config, resume=True))[1]


@pytest.mark.parametrize(
    "damage", [b"", b"[model]\n", b"\xff\xfe", b"objective = 1\noptimization = 2\n", b"[" * 9999]
)
def test_a_damaged_config_toml_stops_no_resume(
    text: TinyText, tmp_path: Path, damage: bytes
) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(changed(config, total_updates=4))
    (tmp_path / "run" / "config.toml").write_bytes(damage)
    _, said = run(changed(config, resume=True))
    assert "config.toml cannot be compared with the settings now" in said
    assert "resuming from" in said
    assert (tmp_path / "run" / "config.toml").read_text().startswith("[model]\nencoder_layers")


def test_the_users_files_in_the_export_stay_there(text: TinyText, tmp_path: Path) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(changed(config, total_updates=4))
    (tmp_path / "run" / "hf" / "thesis.tex").write_text("mine")
    before = tree(tmp_path / "run" / "hf")
    result, said = run(changed(config, resume=True))
    assert "warning: no Hugging Face export: " in said
    assert "thesis.tex" in said
    assert result.export is None
    assert tree(tmp_path / "run" / "hf") == before


def test_a_run_that_is_extended_has_no_report_until_it_is_finished_again(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(config)
    longer = changed(config, total_updates=12, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "export", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(longer)
    assert not (tmp_path / "run" / "report.md").exists()
    result, _ = run(longer)
    assert result.export is not None
    assert "12 updates" in (tmp_path / "run" / "report.md").read_text()


def test_metrics_after_the_resumed_update_are_not_kept_twice(
    text: TinyText, tmp_path: Path
) -> None:
    config = changed(tiny_config(text, tmp_path / "run"), checkpoint_interval=4)
    run(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    run(changed(config, resume_checkpoint=tmp_path / "run" / "checkpoint4"))
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in again]
    assert steps == [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed was 12345 and is 1"),
        ({"batch_size": 8}, "batch was 8 and is 16"),
        ({"pred_prob": 0.2}, "masking was"),
    ],
)
def test_another_identity_is_refused_by_name_and_allowed_on_request(
    text: TinyText, tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(changed(config, total_updates=4))
    other = changed(config, resume=True, **changes)
    with pytest.raises(CheckpointError, match=name):
        run(other)
    _, said = run(changed(other, allow_change=name.split()[0]))
    assert "not exactly the uninterrupted run" in said


def test_other_data_is_refused(text: TinyText, tmp_path: Path) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(changed(config, total_updates=4))
    with pytest.raises(CheckpointError, match="data was"):
        run(changed(config, resume=True, train_dir=text.train_dir / "a.txt"))
    other = changed(config, train_dir=text.train_dir / "a.txt", allow_change="data")
    result, said = run(changed(other, resume=True))
    assert "not exactly the uninterrupted run" in said
    assert result.state.update == config.optimization.total_updates


def test_a_tokenizer_with_two_ids_swapped_is_refused_on_resume(
    text: TinyText, tmp_path: Path
) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(changed(config, total_updates=4))
    shutil.copytree(text.tokenizer, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = description["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(description), encoding="utf-8")
    before = tree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="tokenizer was"):
        run(changed(config, resume=True, tokenizer_name=str(tmp_path / "other")))
    assert tree(tmp_path / "run") == before


def test_another_network_is_refused(text: TinyText, tmp_path: Path) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(changed(config, total_updates=4))
    with pytest.raises(CheckpointError, match="encoder_ffn_dim was 32 and is 64"):
        run(changed(config, resume=True, encoder_ffn_dim=64))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    text: TinyText, tmp_path: Path
) -> None:
    config = changed(tiny_config(text, tmp_path / "run"), checkpoint_interval=3, valid_file=None)
    run(config)
    whole = tensors_of(tmp_path / "run" / "checkpoint8")
    for update in (6, 8):
        model = tmp_path / "run" / f"checkpoint{update}" / "model.safetensors"
        model.write_bytes(model.read_bytes()[:-1])
    _, said = run(changed(config, resume=True))
    assert "checkpoint8/model.safetensors" in said
    assert "after update 3" in said
    assert tensors_of(tmp_path / "run" / "checkpoint8") == whole


def test_a_directory_with_a_run_is_refused_and_left_alone(text: TinyText, tmp_path: Path) -> None:
    config = tiny_config(text, tmp_path / "run")
    run(config)
    before = tree(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"--resume.*--overwrite"):
        run(config)
    assert tree(tmp_path / "run") == before


def test_accumulation_gives_the_gradient_of_the_whole_batch(text: TinyText, tmp_path: Path) -> None:
    weights = []
    for batch_size, update_freq in ((8, 1), (4, 2), (1, 8)):
        directory = tmp_path / f"{batch_size}x{update_freq}"
        config = changed(
            tiny_config(text, directory),
            batch_size=batch_size,
            update_freq=update_freq,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
        )
        run(config)
        weights.append(load_checkpoint(directory / "checkpoint8").model_tensors)
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=0, msg=name)


def test_a_nan_loss_stops_before_the_update(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(tiny_config(text, tmp_path / "run"), checkpoint_interval=2)
    loss_sum = MPNetForPretraining.loss_sum
    calls = []

    def fail_at_the_sixth(self: MPNetForPretraining, *arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return loss_sum(self, *arguments) * (float("nan") if len(calls) == 11 else 1)

    monkeypatch.setattr(MPNetForPretraining, "loss_sum", fail_at_the_sixth)
    with pytest.raises(DivergedError, match="update 6 is nan"):
        run(config)
    last = load_checkpoint(tmp_path / "run" / "checkpoint4")
    assert all(tensor.isfinite().all() for tensor in last.model_tensors.values())


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


MOMENTS = {
    "moving the network": "annotated_mpnet.runs.run.SharedNetwork",
    "an update": "annotated_mpnet.mpnet.pretraining.MPNetForPretraining.loss_sum",
    "an evaluation": "annotated_mpnet.mpnet.pretraining.MPNetForPretraining.forward",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_running_out_of_memory_names_the_flags_to_try(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(MOMENTS[moment], out_of_memory)
    with pytest.raises(OutOfMemoryError, match="--batch-size 2 --update-freq 4") as caught:
        run(tiny_config(text, tmp_path / "run"))
    assert caught.value.exit_code == 7
    assert "\n" not in str(caught.value)


def test_a_dry_run_says_what_does_not_fit_and_starts_no_run(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MOMENTS["an update"], out_of_memory)
    with pytest.raises(OutOfMemoryError, match="--batch-size 2 --update-freq 4"):
        rehearse(tiny_config(text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_a_run_would_be_and_writes_nothing(
    text: TinyText, tmp_path: Path
) -> None:
    config = tiny_config(text, tmp_path / "run")
    result, said = rehearse(config)
    for wanted in (
        "warm-up: shorter",
        "device: cpu",
        "attention: ",
        "k parameters, 2 layers, 16 wide",
        "update: 8 sequences (4 x 2 micro-batches), up to 256 tokens",
        "training: 8 updates",
        "memory: about",
        "tried: one micro-batch of 4 sequences and a step took",
        "tried: at most",
        "finishes at about",
        "dry run: nothing was trained, and no run was started",
    ):
        assert wanted in said
    assert result is None
    assert not (tmp_path / "run").exists()
    # An existing run is not changed either.
    run(changed(config, total_updates=4))
    before = tree(tmp_path / "run")
    rehearse(changed(config, resume=True))
    assert tree(tmp_path / "run") == before


def test_a_nan_evaluation_is_not_the_best(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = iter([Evaluation(math.nan, 0.0), Evaluation(9.0, 0.1)])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: next(evaluations))
    config = changed(tiny_config(text, tmp_path / "run"), test_file=None, export_hf=False)
    result, _ = run(config)
    assert result.state.best_valid_bits == 9.0
    assert load_checkpoint(tmp_path / "run" / "best_checkpoint").state.update == 8


def test_the_export_opens_in_transformers(text: TinyText, tmp_path: Path) -> None:
    result, _ = run(tiny_config(text, tmp_path / "run"))
    assert result.export is not None
    tokenizer = AutoTokenizer.from_pretrained(result.export)
    model = AutoModelForMaskedLM.from_pretrained(result.export)
    encoded = tokenizer("She was <mask> of it.", return_tensors="pt")
    assert model(**encoded).logits.shape[-1] == len(tokenizer)


def test_a_model_that_hugging_face_cannot_represent_is_not_exported_and_the_log_says_so(
    text: TinyText, tmp_path: Path
) -> None:
    config = changed(tiny_config(text, tmp_path / "run"), normalize_before=True)
    result, said = run(config)
    assert result.export is None
    assert "no Hugging Face export" in said
    assert "normalize_before is True" in said
    assert "is complete" in run(changed(config, resume=True))[1]


@pytest.mark.parametrize("mode", ["mlm", "plm"])
def test_the_other_objectives_train_too(text: TinyText, tmp_path: Path, mode: str) -> None:
    result, _ = run(changed(tiny_config(text, tmp_path / "run"), input_mode=mode))
    assert result.state.predicted_seen > 0


def test_a_run_starts_from_a_hugging_face_model(text: TinyText, tmp_path: Path) -> None:
    first, _ = run(tiny_config(text, tmp_path / "first"))
    config = changed(tiny_config(text, tmp_path / "second"), hf_model_path=str(first.export))
    _, said = run(changed(config, encoder_layers=5))
    assert "its architecture replaces the flags" in said
    assert load_checkpoint(tmp_path / "second" / "checkpoint8").model_config.encoder_layers == 2


def test_frequencies_as_head_bias_start_on_the_plateau(text: TinyText, tmp_path: Path) -> None:
    bits = {}
    for bias in ("zeros", "frequencies"):
        config = changed(
            tiny_config(text, tmp_path / bias),
            head_bias=bias,
            lr=1e-9,
            total_updates=1,
            warmup_updates=0,
        )
        result, _ = run(config)
        assert result.plateau is not None
        bits[bias] = result.state.best_valid_bits
    assert bits["zeros"] == pytest.approx(8.64, abs=0.1)  # log2(400): guessing uniformly
    assert bits["frequencies"] == pytest.approx(result.plateau.bits, abs=0.3)


def test_a_run_that_stays_on_the_plateau_is_told_once_what_to_try(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plateau, "LEAST_PATIENCE", 3)
    config = changed(tiny_config(text, tmp_path / "run"), relative_bias_init="normal")
    _, said = run(changed(config, total_updates=6))
    assert said.count("still on the plateau after 4 updates") == 1
    assert "try --relative-bias-init local, a lower --lr" in said
    # The run's metrics already show it, so it is not printed again.
    _, said = run(changed(config, resume=True))
    assert "plateau after" not in said


def test_a_run_says_when_it_leaves_the_plateau_and_so_does_its_report(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A head that starts from zeros begins above the plateau; half of the way to it suffices here.
    monkeypatch.setattr(plateau, "MARGIN_BITS", -0.5)
    config = changed(
        tiny_config(text, tmp_path / "run"), lr=3e-2, total_updates=40, logging_steps=1
    )
    _, said = run(config)
    assert said.count("left the plateau at update ") == 1
    assert "Training left the plateau" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_dir": None}, DataError, "--train-dir"),
        ({"train_dir": Path("nowhere")}, DataError, "--train-dir.*nowhere"),
        ({"tokenizer_name": "nowhere/at/all"}, ConfigError, "--tokenizer-name"),
        ({"device": "cuda"}, ConfigError, "--device is cuda"),
        ({"attention": "triton"}, ConfigError, "--attention triton needs a GPU"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    text: TinyText,
    tmp_path: Path,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(error, match=message):
        run(changed(tiny_config(text, tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
