"""The example: MPNet on one page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer

from annotated_mpnet.text.tokenizer import vocabulary_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal.py"


def test_the_example_learns_and_returns_hidden_states(tmp_path: Path) -> None:
    toy_tokenizer.word_piece().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("a tall tale of a mask, and of a tall mask. " * 200)
    files = [str(tmp_path / name) for name in ("text.txt", "tokenizer")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *files, "41"],
        capture_output=True,
        text=True,
        # On few cores, threads of several processes would wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    losses = [float(each) for each in re.findall(r"update \d+: (\d+\.\d+) bits", printed)]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < losses[0] - 2
    assert printed.splitlines()[-1] == "hidden states: (32, 64, 128)"


def test_the_example_fits_on_a_page_and_needs_the_book_alone() -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    ours = re.findall(r"annotated_mpnet\.?(\w*)", source)
    assert ours
    assert set(ours) == {"mpnet"}


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "Unigram"])
def test_the_example_finds_words_as_the_command_line_does(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import minimal

    tokenizer = toy_tokenizer.learned(kind)
    ours, example = vocabulary_of(tokenizer), minimal.vocabulary_of(tokenizer)
    assert (ours.size, ours.pad_id, ours.mask_id) == (example.size, example.pad_id, example.mask_id)
    assert np.array_equal(ours.random_ids, example.random_ids)
    # Pieces of bytes that are no letters are not among these.
    used = tokenizer(toy_tokenizer.TEXT, add_special_tokens=False).input_ids
    assert np.array_equal(ours.starts_word_V[used], example.starts_word_V[used])
    assert not ours.ends_word_V[used].any()
