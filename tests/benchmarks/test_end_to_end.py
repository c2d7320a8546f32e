"""Learners start equal, see the same sequences, end with their schedule, are evaluated alike."""

import math
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import TINY_FLAGS, checked, in_this_process, run_main, without_novels

import end_to_end
import learners
from annotated_mpnet.mpnet.optimizer import learning_rate
from annotated_mpnet.runs.texts import Text, read_text
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.training.loader import evaluation_batches
from learners import LEARNERS, HuggingFace, Ours, judge, train
from tiny_run import TinyText, changed, tiny_config


@pytest.fixture(scope="module")
def config(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> PretrainingConfig:
    config = tiny_config(text, tmp_path_factory.mktemp("run"))
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return changed(config, head_bias="frequencies", **still)


@pytest.fixture(scope="module")
def data(config: PretrainingConfig) -> Text:
    return read_text(config.data, config.run.seed)


def test_transformers_network_can_start_from_our_weights(
    config: PretrainingConfig, data: Text
) -> None:
    assert data.valid is not None
    ours, theirs = (LEARNERS[name](config, data, 10) for name in ("mlm", "hf-local"))
    assert isinstance(ours, Ours)
    collator = learners.collator_of(config.objective, config, data, 1)
    batch = next(evaluation_batches(data.valid, collator, 3))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(batch, "mlm"), theirs.logits(batch, "mlm"), atol=1e-5, rtol=1e-5
        )
    assert ours.model.lm_head.bias.count_nonzero() > 0


def test_without_the_local_start_transformers_network_keeps_its_own_initialisation(
    config: PretrainingConfig, data: Text
) -> None:
    learner = LEARNERS["hf"](config, data, 10)
    assert isinstance(learner, HuggingFace)
    weights = learner.model.state_dict()
    assert weights["lm_head.bias"].count_nonzero() == 0
    assert weights["mpnet.encoder.relative_attention_bias.weight"].abs().max() < 0.1


@pytest.mark.parametrize("name", ["mpnet", "mlm"])
def test_the_two_starts_differ_only_in_the_bias_table(
    name: str, config: PretrainingConfig, data: Text
) -> None:
    local, normal = (LEARNERS[each](config, data, 10) for each in (name, f"{name}-normal"))
    assert isinstance(local, Ours)
    assert isinstance(normal, Ours)
    before, after = normal.model.state_dict(), local.model.state_dict()
    differing = [key for key in before if not torch.equal(before[key], after[key])]
    assert differing == ["sentence_encoder.relative_attention_bias.weight"]


def test_all_see_the_same_sequences_in_the_same_order(
    config: PretrainingConfig, data: Text
) -> None:
    ours, theirs = (LEARNERS[name](config, data, 10) for name in ("mpnet", "hf"))
    share = []
    for (batch,), other in islice(zip(ours.batches(), theirs.batches(), strict=False), 5):
        # Positions that neither of them predicts, so neither has replaced the token.
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
def test_a_learner_learns(name: str, config: PretrainingConfig, data: Text) -> None:
    config = changed(config, lr=3e-2, head_bias="zeros")
    before, _ = judge(LEARNERS[name](config, data, 1), "tokens")
    learner = LEARNERS[name](config, data, 60)
    found = train(learner, 60)
    after, accuracy = judge(learner, "tokens")
    assert before == pytest.approx(math.log2(data.vocabulary.size), abs=0.3)
    assert after < before - 0.5
    assert 0 <= accuracy <= 1
    assert found["tokens"] == 60 * 4 * 32


def test_the_script_trains_and_evaluates_all(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_novels(end_to_end, text, monkeypatch)
    replacement = SimpleNamespace(run=in_this_process(end_to_end.main), PIPE=0)
    monkeypatch.setattr(end_to_end, "subprocess", replacement)
    picture = tmp_path / "curves.svg"
    flags = ["--minutes", "0.002", "--seeds", "1", "2", "--picture", str(picture)]
    flags += ["--", *TINY_FLAGS]
    results = run_main(end_to_end.main, flags, tmp_path, monkeypatch)
    assert [(each["learner"], each["seed"]) for each in results] == [
        (name, seed) for seed in (1, 2) for name in LEARNERS
    ]
    for result in results:
        assert {"updates", "seconds", "tokens", "tokens_bits", "words_bits"} <= set(result)
        assert ("mpnet_bits" in result) == result["learner"].startswith("mpnet")
        seconds = [point[0] for point in result["curve"]]
        assert seconds == sorted(seconds)
        assert seconds[-1] <= result["seconds"]
        assert result["curve"][-1][1] == result["words_bits"]
    printed = checked(capsys.readouterr().out)
    assert "median of 2, hf-local: tokens" in printed
    assert "seed 2, time to hf's final" in printed
    assert "<svg" in picture.read_text()


def test_the_users_own_text_is_split_for_validation(
    text: TinyText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacement = SimpleNamespace(run=in_this_process(end_to_end.main), PIPE=0)
    monkeypatch.setattr(end_to_end, "subprocess", replacement)
    flags = ["--minutes", "0.002", "--with", "mlm", "--preset", "tiny", "--text"]
    flags += [str(text.train_dir), "--tokenizer", str(text.tokenizer), "--"]
    (result,) = run_main(end_to_end.main, [*flags, *TINY_FLAGS], tmp_path, monkeypatch)
    assert result["words_bits"] > 0
