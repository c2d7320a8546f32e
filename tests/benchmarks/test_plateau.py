"""`benchmarks/plateau.py` shows where heads look at the start."""

from pathlib import Path

import pytest
from scripts import TINY_FLAGS, checked, run_main, without_novels

import plateau
from tiny_run import TinyText


def test_the_script_shows_where_heads_look_with_each_start(
    text: TinyText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_novels(plateau, text, monkeypatch)
    tiny_flags = list(TINY_FLAGS)
    tiny_flags[tiny_flags.index("--encoder-attention-heads") + 1] = "4"
    results = run_main(
        plateau.main, ["--updates", "0", "2", "--", *tiny_flags], tmp_path, monkeypatch
    )
    assert [(each["start"], each["update"]) for each in results] == [
        (start, update) for start in ("normal", "local") for update in (0, 2)
    ]
    normal, local = results[0], results[2]
    # Uniform attention over 32 tokens gives each about 3 percent.
    assert all(2 < weight < 5 for head in normal["percent"] for weight in head)
    left, right, *free = local["percent"]
    assert left[3] > 50
    assert right[5] > 50
    assert all(2 < weight < 5 for head in free for weight in head)
    # A head learns its values faster if it looks at one position than if it averages over all.
    assert min(local["values_gradient"][:2]) > 1.5 * max(normal["values_gradient"])
    assert "local start, update 2" in checked(capsys.readouterr().out)
