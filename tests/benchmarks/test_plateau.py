"""What `benchmarks/plateau.py` shows is true at the start, of a network of any size."""

import shutil
from pathlib import Path

import pytest
from scripts import checked, run_main
from test_end_to_end import TINY_FLAGS

import plateau
from tiny_run import write_text


def test_the_script_shows_where_heads_look_with_either_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = write_text(tmp_path / "text")

    def prepare(folder: Path, *_: object) -> tuple[Path, str]:
        shutil.copytree(tiny.train_dir.parent, folder / "novels")
        return folder / "novels" / tiny.train_dir.name, str(tiny.tokenizer)

    monkeypatch.setattr(plateau, "prepare", prepare)
    tiny_flags = list(TINY_FLAGS)
    tiny_flags[tiny_flags.index("--encoder-attention-heads") + 1] = "4"
    rows = run_main(plateau.main, ["--updates", "0", "2", "--", *tiny_flags], tmp_path, monkeypatch)
    assert [(row["start"], row["update"]) for row in rows] == [
        (start, update) for start in ("normal", "local") for update in (0, 2)
    ]
    normal, local = rows[0], rows[2]
    # Sequences of 32 tokens: an even spread gives each 3 percent.
    assert all(2 < weight < 5 for head in normal["percent"] for weight in head)
    left, right, *free = local["percent"]
    assert left[3] > 50
    assert right[5] > 50
    assert all(2 < weight < 5 for head in free for weight in head)
    # What a head takes from a single place is easier to learn than what it takes from an average.
    assert min(local["values_gradient"][:2]) > 1.5 * max(normal["values_gradient"])
    assert "local start, update 2" in checked(capsys.readouterr().out)
