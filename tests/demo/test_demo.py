"""The demo with very few updates: every step runs, but nothing is learned."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from annotated_mpnet.demo.corpus import DIRECTORY, TRAIN, unpack
from annotated_mpnet.demo.show import prepare, run_demo
from annotated_mpnet.mpnet.collator import DataCollatorForMaskedPermutedLanguageModeling
from annotated_mpnet.runs.texts import read_text
from annotated_mpnet.settings.parsing import parse_pretrain
from annotated_mpnet.text.sequences import PackedSequences
from annotated_mpnet.training.loader import BatchLoader
from batches import hash_of_first_100


def test_the_demo_runs_shows_results_and_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = parse_pretrain(
        ["--preset=demo", "--total-updates=2", "--warmup-updates=1", "--logging-steps=1"]
    ).settings
    said = io.StringIO()
    result = run_demo(settings, Console(file=said, width=120))
    assert result.export is not None
    text = said.getvalue()
    assert text.count("____") == 6
    assert "paragraphs the longest word was masked" in text
    assert "guessing by frequency" in text
    assert result.plateau is not None
    assert result.state.best_valid_bits is not None
    uses_context = result.state.best_valid_bits < result.plateau.bits
    assert ("times fewer words" in text, "does not use the context" in text) == (
        uses_context,
        not uses_context,
    )
    assert "from transformers import pipeline" in text


def test_the_preset_expects_the_text_where_the_demo_writes_it() -> None:
    data = parse_pretrain(["--preset", "demo"]).settings.data
    assert data.train_dir == DIRECTORY / "train"
    assert data.valid_file == DIRECTORY / "valid.txt"
    assert data.test_file == DIRECTORY / "test.txt"
    assert data.tokenizer_name == str(DIRECTORY / "tokenizer")


def test_the_novels_are_whole_and_none_is_in_two_parts(tmp_path: Path) -> None:
    unpack(tmp_path)
    files = sorted(tmp_path.rglob("*.txt"))
    assert len(files) == 6
    assert sum(len(file.read_text().split()) for file in files) == 717_537
    assert len({file.read_bytes() for file in files}) == 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in which a demo has written its novels and its tokenizer."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(parse_pretrain(["--preset", "demo"]).settings, Console(file=io.StringIO()))
    return folder


def test_the_first_100_batches_never_change(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tokenizer, sequences, order and masks of the demo depend only on its text and seed, not on the
    # machine or library versions. If this changes, every run in progress changes.
    monkeypatch.chdir(prepared)
    settings = parse_pretrain(["--preset", "demo"]).settings
    text = read_text(settings.data, settings.run.seed)
    assert isinstance(text.train, PackedSequences)
    collator = DataCollatorForMaskedPermutedLanguageModeling(
        text.vocabulary, settings.objective, settings.data.max_tokens, settings.run.seed
    )
    loader = BatchLoader(text.train, collator, settings.optimization.batch_size, settings.run.seed)
    assert hash_of_first_100(loader) == "ebe66e7dcdb07b36"


def test_demos_that_start_together_do_not_touch_each_others_files(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    settings = parse_pretrain(["--preset", "demo"]).settings
    files = sorted(path for path in DIRECTORY.rglob("*") if path.is_file())
    made = {path: (path.read_bytes(), path.stat().st_ino) for path in files}
    # Another demo is reading them, so they are neither truncated nor replaced.
    novel = DIRECTORY / "train" / f"{TRAIN[0]}.txt"
    novel_bytes = novel.read_bytes()
    (DIRECTORY / "valid.txt").write_text("half a nov")
    prepare(settings, Console(file=io.StringIO()))
    for path, (content, number) in made.items():
        assert path.read_bytes() == content, path
        if path.name not in ("valid.txt", ".lock"):
            assert path.stat().st_ino == number, path
    assert novel.read_bytes() == novel_bytes
