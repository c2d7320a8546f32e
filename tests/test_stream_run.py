"""Whole runs over a stream, with a folder of shards instead of the Hub and the same loader."""

import random
import shutil
from pathlib import Path

import pytest

from annotated_mpnet.checkpoints.checkpoint import STREAM, STREAM_TENSORS
from annotated_mpnet.checkpoints.manifest import verify_checkpoint
from annotated_mpnet.errors import CheckpointError, DataError
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.streams import shards
from folders import tensors_of
from tiny_run import TinyText, changed, run, tiny_config, write_dataset


@pytest.fixture(scope="module")
def dataset(text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(text, tmp_path_factory.mktemp("dataset"), shards=5)


def stream_config(text: TinyText, dataset: Path, directory: Path) -> PretrainingConfig:
    """Configure 40 updates, which read the dataset about twice."""
    return changed(
        tiny_config(text, directory),
        train_dir=None,
        valid_file=None,
        test_file=None,
        dataset_name=str(dataset),
        buffer_size=50,
        eval_samples=5,
        min_text_length=20,
        total_updates=40,
        eval_interval_steps=10,
        checkpoint_interval=10,
    )


def test_a_stream_resumed_twice_equals_the_uninterrupted_one(
    text: TinyText, dataset: Path, tmp_path: Path
) -> None:
    config = stream_config(text, dataset, tmp_path / "run")
    result, said = run(config)
    assert "stream of" in said
    assert result.test is not None
    assert result.state.best_valid_bits is not None
    whole = tensors_of(tmp_path / "run" / "checkpoint40")
    for start in (10, 30):
        for update in (20, 30, 40):
            if update > start:
                shutil.rmtree(tmp_path / "run" / f"checkpoint{update}")
        run(changed(config, resume_checkpoint=tmp_path / "run" / f"checkpoint{start}"))
        assert tensors_of(tmp_path / "run" / "checkpoint40") == whole


def test_another_dataset_is_refused_by_name(text: TinyText, dataset: Path, tmp_path: Path) -> None:
    config = stream_config(text, dataset, tmp_path / "run")
    run(changed(config, total_updates=10))
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    (other / "train-00000.jsonl").write_text('{"text": "Another text, of sufficient length."}\n')
    with pytest.raises(CheckpointError, match="data was"):
        run(changed(config, resume=True, dataset_name=str(other)))


def test_damage_of_the_position_in_a_stream_is_found(
    text: TinyText, dataset: Path, tmp_path: Path
) -> None:
    config = stream_config(text, dataset, tmp_path / "run")
    run(changed(config, total_updates=2))
    checkpoint = tmp_path / "run" / "checkpoint2"
    for name in (STREAM, STREAM_TENSORS):
        whole = (checkpoint / name).read_bytes()
        places = random.Random(7).choices(range(8 * len(whole)), k=200)
        damaged = [whole[:cut] for cut in (0, 1, 8, len(whole) // 2, len(whole) - 1)]
        for place in places:
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            damaged.append(bytes(flipped))
        for content in damaged:
            (checkpoint / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=name):
                verify_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(whole)
    verify_checkpoint(checkpoint)


def test_a_downloaded_dataset_trains_like_files(
    text: TinyText, dataset: Path, tmp_path: Path
) -> None:
    config = changed(
        stream_config(text, dataset, tmp_path / "run"),
        streaming=False,
        valid_fraction=0.1,
        total_updates=4,
    )
    result, said = run(config)
    assert result.state.best_valid_bits is not None
    assert "% full" in said


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_every_packing_trains_on_files(text: TinyText, tmp_path: Path, packing: str) -> None:
    config = changed(tiny_config(text, tmp_path / "run"), packing=packing)
    result, _ = run(config)
    assert result.state.predicted_seen > 0
    with pytest.raises(CheckpointError, match=f"packing was '{packing}' and is 'full'"):
        run(changed(config, packing="full", resume=True, total_updates=9))


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_every_packing_trains_on_a_stream(
    text: TinyText, dataset: Path, tmp_path: Path, packing: str
) -> None:
    config = stream_config(text, dataset, tmp_path / "run")
    result, _ = run(changed(config, packing=packing, total_updates=4))
    assert result.state.predicted_seen > 0


def test_an_unreachable_hub_is_said_at_once_with_the_ways_out(
    text: TinyText, dataset: Path, tmp_path: Path
) -> None:
    config = changed(stream_config(text, dataset, tmp_path / "run"), dataset_name=None)
    with pytest.raises(DataError, match=r"--preset demo.*--train-dir"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_stream_that_breaks_off_leaves_a_checkpoint(
    text: TinyText, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(
        stream_config(text, dataset, tmp_path / "run"), checkpoint_interval=-1, eval_samples=0
    )
    read = shards.ShardReader._read
    steps = []

    def break_later(self: shards.ShardReader, position: shards.Position) -> object:
        for step in read(self, position):
            steps.append(step)
            if len(steps) > 2:
                raise DataError("the network is gone")
            yield step

    monkeypatch.setattr(shards.ShardReader, "_read", break_later)
    with pytest.raises(DataError, match="gone"):
        run(config)
    (saved,) = (tmp_path / "run").glob("checkpoint[0-9]*")
    monkeypatch.undo()
    run(changed(config, resume=True))
    whole, _ = run(changed(config, checkpoint_dir=tmp_path / "whole"))
    assert int(saved.name.removeprefix("checkpoint")) < 40
    ends = [tensors_of(tmp_path / name / "checkpoint40") for name in ("run", "whole")]
    assert ends[0] == ends[1]
    assert whole.state.update == 40
