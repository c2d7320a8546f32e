"""From which checkpoint a run resumes, which ones it keeps, and when it is another run."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import CONFIG, OTHER_RUN, RUN, make_checkpoint, same_tensors, save

from annotated_mpnet.checkpoints.checkpoint import BEST, MODEL, STATE
from annotated_mpnet.checkpoints.manifest import MANIFEST
from annotated_mpnet.checkpoints.resume import (
    compare_identity,
    compare_model_config,
    newest_valid_checkpoint,
)
from annotated_mpnet.checkpoints.retention import prune, recover
from annotated_mpnet.errors import CheckpointError, ConfigError
from folders import names_in, tree


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_means_the_highest_update_not_name_or_time(tmp_path: Path) -> None:
    for update in (1000, 900, 99):
        save(tmp_path, update)
    found = newest_valid_checkpoint(tmp_path, RUN)
    assert found is not None
    assert (found.path.name, found.warnings) == ("checkpoint1000", [])
    assert same_tensors(found.checkpoint, make_checkpoint(1000))


def test_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_valid_checkpoint(tmp_path, RUN) is None


@pytest.mark.parametrize("name", [MODEL, STATE, MANIFEST])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_why(
    tmp_path: Path, name: str
) -> None:
    for update in (10, 20, 30):
        save(tmp_path, update)
    damage(tmp_path / "checkpoint30" / name)
    found = newest_valid_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.path.name == "checkpoint20"
    assert len(found.warnings) == 1
    assert f"checkpoint30/{name}" in found.warnings[0]
    assert "\n" not in found.warnings[0]


def test_a_run_can_resume_from_best_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20, BEST)
    found = newest_valid_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.path.name == BEST
    damage(tmp_path / BEST / STATE)
    found = newest_valid_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.path.name == "checkpoint10"


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for update in (10, 20):
        damage(save(tmp_path, update) / MODEL)
    (tmp_path / "checkpoint30").mkdir()
    (tmp_path / "checkpoint40").write_text("")
    with pytest.raises(CheckpointError, match=r"none of the 4 checkpoints .*checkpoint40.*--over"):
        newest_valid_checkpoint(tmp_path, RUN)


def test_another_runs_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    save(tmp_path, 99999999, run_id=OTHER_RUN)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        newest_valid_checkpoint(tmp_path, RUN)
    save(tmp_path, 10)
    found = newest_valid_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.path.name == "checkpoint10"
    assert "checkpoint99999999 belongs to another run" in found.warnings[0]


@pytest.mark.parametrize(
    ("keep", "kept"), [(-1, {10, 20, 30, 40}), (0, set()), (2, {30, 40}), (9, {10, 20, 30, 40})]
)
def test_prune_keeps_the_newest_and_the_best(tmp_path: Path, keep: int, kept: set[int]) -> None:
    for update in (10, 20, 30, 40):
        save(tmp_path, update)
    save(tmp_path, 10, BEST)
    assert prune(tmp_path, keep, RUN, protected=()) == []
    assert names_in(tmp_path) == {BEST, *(f"checkpoint{update}" for update in kept)}


def test_prune_keeps_what_was_just_saved_by_a_run_resumed_from_an_older_one(tmp_path: Path) -> None:
    for update in (10, 20, 30):
        save(tmp_path, update)
    save(tmp_path, 15)
    prune(tmp_path, 1, RUN, protected={"checkpoint15"})
    assert names_in(tmp_path) == {"checkpoint15", "checkpoint30"}


def test_prune_does_not_count_what_is_damaged(tmp_path: Path) -> None:
    for update in (10, 20, 30):
        save(tmp_path, update)
    damage(tmp_path / "checkpoint30" / MANIFEST)
    prune(tmp_path, 1, RUN, protected=())
    assert names_in(tmp_path) == {"checkpoint20", "checkpoint30"}


def test_prune_and_recover_never_touch_what_others_wrote(tmp_path: Path) -> None:
    save(tmp_path, 99999999, run_id=OTHER_RUN)
    (tmp_path / "checkpoint5").symlink_to(save(tmp_path, 5).rename(tmp_path / "elsewhere"))
    shutil.copytree(save(tmp_path, 7), tmp_path / "checkpoint_old.bak")
    shutil.copytree(tmp_path / "checkpoint7", tmp_path / "checkpoint007")
    (tmp_path / "best.txt").write_text("checkpoint7")
    (tmp_path / ".old-notes").mkdir()
    before = tree(tmp_path)
    assert prune(tmp_path, 0, RUN, protected=()) == []
    recover(tmp_path)
    after = tree(tmp_path)
    assert {name for name in before if name not in after} == {
        name for name in before if name.startswith("checkpoint7/")
    }
    assert (tmp_path / "checkpoint5").is_symlink()
    assert (tmp_path / ".old-notes").is_dir()


def test_prune_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        (warning,) = prune(tmp_path, 1, RUN, protected=())
    assert "checkpoint10 could not be deleted (Operation not permitted)" in warning
    recover(tmp_path)
    assert names_in(tmp_path) == {"checkpoint20"}


def test_recover_cleans_up_after_a_killed_process(tmp_path: Path) -> None:
    os.rename(save(tmp_path, 10, BEST), tmp_path / f".old-{BEST}")
    shutil.copytree(save(tmp_path, 10), tmp_path / ".old-checkpoint10")
    (tmp_path / ".tmp-checkpoint20").mkdir()
    (tmp_path / ".tmp-checkpoint20" / MODEL).write_bytes(b"half")
    (tmp_path / ".tmp-config.toml").write_text("half")
    recover(tmp_path)
    assert names_in(tmp_path) == {BEST, "checkpoint10"}
    found = newest_valid_checkpoint(tmp_path, RUN)
    assert found is not None
    assert found.warnings == []


SAVED: dict[str, str | int | float] = {"data": "abc", "seed": 1, "batch": 64, "masking": 0.15}


def test_same_identity_has_no_differences() -> None:
    assert compare_identity(SAVED, dict(SAVED), allowed=[]) == []


def test_every_difference_is_named_with_both_values_and_a_way_out() -> None:
    with pytest.raises(CheckpointError) as caught:
        compare_identity(SAVED, {**SAVED, "data": "def", "seed": 2}, allowed=[])
    message = str(caught.value)
    assert "data was 'abc' and is 'def'; seed was 1 and is 2" in message
    assert "--allow-change data,seed" in message


def test_an_allowed_difference_is_reported_and_the_others_refused() -> None:
    current = {**SAVED, "data": "def", "seed": 2}
    assert compare_identity(SAVED, {**SAVED, "seed": 2}, ["seed"]) == ["seed was 1 and is 2"]
    with pytest.raises(CheckpointError, match="--allow-change data,seed") as caught:
        compare_identity(SAVED, current, ["seed"])
    assert "seed was" not in str(caught.value)


def test_a_field_that_only_one_side_has_is_a_difference() -> None:
    with pytest.raises(CheckpointError, match="length was None and is 512"):
        compare_identity(SAVED, {**SAVED, "length": 512}, allowed=[])


def test_a_misspelt_name_to_allow_is_a_wrong_flag() -> None:
    with pytest.raises(ConfigError, match="'sede'; expected some of batch,data,masking,seed"):
        compare_identity(SAVED, SAVED, allowed=["sede"])


def test_another_model_is_refused_with_field_and_both_values() -> None:
    other = dataclasses.replace(CONFIG, encoder_layers=2, activation_fn="relu")
    with pytest.raises(CheckpointError) as caught:
        compare_model_config(CONFIG, other)
    assert "activation_fn was 'gelu' and is 'relu'; encoder_layers was 1 and is 2" in str(
        caught.value
    )


def test_dropout_may_change_and_is_reported() -> None:
    other = dataclasses.replace(CONFIG, attention_dropout=0.0)
    assert compare_model_config(CONFIG, other) == ["attention_dropout was 0.1 and is 0.0"]
