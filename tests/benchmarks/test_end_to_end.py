"""Learners begin alike, see the same rows, end their schedule in time, and are judged alike."""

import math
import shutil
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import checked, in_this_process, run_main

import end_to_end
import learners
from annotated_mpnet.config import PretrainingConfig
from annotated_mpnet.data import evaluation_batches
from annotated_mpnet.data.texts import Text, read_text
from annotated_mpnet.training.optimizer import learning_rate
from learners import LEARNERS, HuggingFace, Ours, judge, train
from tiny_run import TinyText, changed, tiny_config, write_text

TINY_FLAGS = [
    "--encoder-layers",
    "1",
    "--encoder-embed-dim",
    "16",
    "--encoder-ffn-dim",
    "32",
    "--encoder-attention-heads",
    "2",
    "--max-tokens",
    "32",
    "--batch-size",
    "4",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyText:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(tiny: TinyText, tmp_path_factory: pytest.TempPathFactory) -> PretrainingConfig:
    config = tiny_config(tiny, tmp_path_factory.mktemp("run"))
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return changed(config, head_bias="frequencies", **still)


@pytest.fixture(scope="module")
def text(config: PretrainingConfig) -> Text:
    return read_text(config.data, config.run.seed)


def test_all_begin_with_the_same_network(config: PretrainingConfig, text: Text) -> None:
    assert text.valid is not None
    ours, theirs = Ours(config, text, 10, "mlm"), HuggingFace(config, text, 10)
    collator = learners.collator_of(config.objective, config, text, 1)
    batch = next(evaluation_batches(text.valid, collator, 3))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(batch, "mlm"), theirs.logits(batch, "mlm"), atol=1e-5, rtol=1e-5
        )
    assert ours.model.lm_head.bias.count_nonzero() > 0


def test_all_see_the_same_rows_in_the_same_order(config: PretrainingConfig, text: Text) -> None:
    ours, theirs = (LEARNERS[name](config, text, 10) for name in ("mpnet", "hf"))
    share = []
    for (batch,), other in islice(zip(ours.batches(), theirs.batches(), strict=False), 5):
        # Where neither has put anything in a token's place.
        untouched = other["labels"] == -100
        untouched.scatter_(1, batch.predicted_positions, False)
        assert torch.equal(batch.input_ids[untouched], other["input_ids"][untouched])
        share.append((other["labels"] != -100).float().mean().item())
    assert 0.05 < sum(share) / len(share) < 0.3


@pytest.mark.parametrize("updates", [7, 100])
def test_the_schedule_ends_with_the_last_update(config: PretrainingConfig, updates: int) -> None:
    optimization = learners.with_schedule(config, updates, "mlm").optimization
    rates = [learning_rate(update, optimization) for update in range(updates + 1)]
    assert rates[-1] == 0
    assert min(rates[:-1]) > 0
    assert max(rates) == optimization.lr


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_learns(name: str, config: PretrainingConfig, text: Text) -> None:
    config = changed(config, lr=3e-2, head_bias="zeros")
    before, _ = judge(LEARNERS[name](config, text, 1), "tokens")
    learner = LEARNERS[name](config, text, 60)
    found = train(learner, 60)
    after, accuracy = judge(learner, "tokens")
    assert before == pytest.approx(math.log2(text.vocabulary.size), abs=0.3)
    assert after < before - 0.5
    assert 0 <= accuracy <= 1
    assert found["tokens"] == 60 * 4 * 32


def test_the_script_trains_and_judges_all(
    tiny: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def prepare(folder: Path, *_: object) -> None:
        shutil.copytree(tiny.train_dir.parent, folder / "novels")
        shutil.copytree(tiny.tokenizer, folder / "tokenizer")

    monkeypatch.setattr(end_to_end, "prepare", prepare)
    stand_in = SimpleNamespace(run=in_this_process(end_to_end.main), PIPE=0)
    monkeypatch.setattr(end_to_end, "subprocess", stand_in)
    flags = ["--minutes", "0.002", "--seeds", "1", "2", "--", *TINY_FLAGS]
    rows = run_main(end_to_end.main, flags, tmp_path, monkeypatch)
    assert [(row["learner"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (1, 2) for name in LEARNERS
    ]
    for row in rows:
        assert {"updates", "seconds", "tokens", "tokens_bits", "words_bits"} <= set(row)
        assert ("mpnet_bits" in row) == (row["learner"] == "mpnet")
    printed = checked(capsys.readouterr().out)
    assert "median of 2 seeds, hf" in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--minutes", "0"], "--minutes is 0"), (["--", "--lr", "fast"], "--lr")],
)
def test_a_wrong_flag_is_refused_before_anything_is_done(
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *flags])
    with pytest.raises(SystemExit) as end:
        end_to_end.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
