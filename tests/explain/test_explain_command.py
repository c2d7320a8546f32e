"""`explain-mpnet` as its user sees it."""

import contextlib
import importlib.util
import io
import re
from functools import partial
from pathlib import Path

import pytest
from examples import (
    MODES,
    NASTY,
    SENTENCE,
    explained,
    explained_by_a_model,
    tiny_asked,
    with_specials,
)
from matplotlib.colors import to_hex
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from annotated_mpnet import cli
from annotated_mpnet.conversion import LoadedWeights
from annotated_mpnet.explain.explanation import Explanation, explain
from annotated_mpnet.explain.picture import HIDDEN, SEEN, draw
from annotated_mpnet.explain.sentence import word_tokenizer
from annotated_mpnet.explain.terminal import show
from annotated_mpnet.mpnet.config import InputMode, ObjectiveConfig
from annotated_mpnet.text.tokenizer import write_tokenizer
from networks import save_network

ROOT = Path(__file__).parents[2]


def command(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, its output, and its errors."""
    said, failed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
        code = cli._ending("explain-mpnet", cli._explain, [str(each) for each in arguments])
    return code, said.getvalue(), failed.getvalue()


def shown(explanation: Explanation, width: int = 80, *, terminal: bool = False) -> str:
    said = io.StringIO()
    show(explanation, Console(file=said, width=width, force_terminal=terminal, color_system=None))
    return said.getvalue()


def test_the_readme_shows_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r'    explain-mpnet ("The cat .*)\n\n```text\n([^`]*)```', readme)
    assert found is not None
    sentence, predict = found[1].split(" --predict ")
    code, said, failed = command(sentence.strip('"'), "--predict", predict.strip('"'))
    assert (code, failed) == (0, "")
    lines = "\n".join(line.rstrip() for line in said.splitlines())
    for part in found[2].split("...\n"):
        assert part in lines + "\n"


@pytest.mark.parametrize("mode", MODES)
def test_all_lines_fit_the_terminal(mode: InputMode) -> None:
    for width in (80, 120):
        for explanation in (explained(mode=mode), explained_by_a_model(mode)):
            said = shown(explanation, width, terminal=True)
            assert max(map(len, said.splitlines())) <= width


def test_a_picture_that_does_not_fit_is_left_out_on_a_terminal_and_kept_in_a_pipe() -> None:
    explanation = explained()
    assert "The picture needs 101 columns and the terminal has 80" in shown(
        explanation, terminal=True
    )
    for said in (shown(explanation), shown(explanation, 101, terminal=True)):
        assert "-> looked" in said


def test_nothing_in_a_sentence_can_steer_the_terminal() -> None:
    said = shown(explained(NASTY), 200)
    assert not set(said) & set("\x1b\u202e\u2028")
    assert "\\x1b[2J" in said
    assert "שלום עולם 👩‍🚀" in said


def test_a_token_of_two_dashes_is_not_taken_for_nothing() -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "so", "--", "then", "<mask>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = ObjectiveConfig(rand_prob=0, keep_prob=0)
    explanation = explain("so -- then", with_specials(backend), settings, predict="then")
    said = "  sees   <s> so -- <mask> </s>\n  bucket 3   2  1  0      17\n"
    assert said in shown(explanation)


def test_what_a_model_says_is_shown() -> None:
    said = shown(explained_by_a_model(), 200)
    answer = explained_by_a_model().shown.predictions[0].answer
    assert f"guesses: “{answer.guesses[0].token}”" in said
    assert f"{answer.bits:.1f} bits" in said
    assert "attends in the last layer (mean of 4 heads) to: “" in said
    assert "bits" in said.split("The three objectives")[1]
    assert "guesses" not in shown(explained_by_a_model(has_head=False), 200)


def test_a_checkpoint_and_a_tokenizer_are_read_from_their_directories(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(SENTENCE)
    model = tiny_asked(tokenizer).model
    write = partial(write_tokenizer, tokenizer)
    directory = save_network(tmp_path, 1, "checkpoint1", model, write)
    code, said, failed = command(SENTENCE, "--checkpoint", directory)
    assert (code, failed) == (0, "")
    assert "tokenizer: the model's own" in said
    assert "guesses" in said
    assert "attends" in said

    same = "--tokenizer", directory / "tokenizer"
    code, alone, failed = command(SENTENCE, *same)
    assert (code, failed) == (0, "")
    assert "guesses" not in alone
    # The lines before tell the paths.
    tables = [text.partition("The sentence")[2].splitlines()[:8] for text in (said, alone)]
    assert tables[0] == tables[1]
    assert command(SENTENCE, "--checkpoint", directory, *same)[0] == 0
    write_tokenizer(word_tokenizer("other words"), tmp_path / "other")
    code, _, failed = command(
        SENTENCE, "--checkpoint", directory, "--tokenizer-name", tmp_path / "other"
    )
    assert code == 2
    assert "is another tokenizer than the one of" in failed
    code, _, failed = command("the " * 60, "--checkpoint", directory)
    assert code == 2
    assert (
        "62 tokens with <s> and </s>; expected at most 40, the number of the checkpoint" in failed
    )


def test_a_sentence_encoder_makes_no_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer(SENTENCE)
    model = tiny_asked(tokenizer).model
    loaded = LoadedWeights(
        model.config, model.state_dict(), ["an encoder"], "a tokenizer", fresh_head=True
    )
    monkeypatch.setattr("annotated_mpnet.explain.model.load_any", lambda path: loaded)
    monkeypatch.setattr("annotated_mpnet.explain.model.load_tokenizer", lambda name: tokenizer)
    code, said, failed = command(SENTENCE, "--checkpoint", "an encoder")
    assert (code, failed) == (0, "")
    assert "note: an encoder\nnote: so it makes no guesses" in said
    assert "guesses:" not in said
    assert "attends" in said


@pytest.mark.parametrize(
    ("weights", "tokenizer", "said"),
    [
        (SENTENCE, None, "does not say which tokenizer it has; name it with --tokenizer-name"),
        ("few words", SENTENCE, "tokens, and 'a.pt' has embeddings for"),
    ],
)
def test_a_model_without_its_tokenizer_is_an_error(
    weights: str, tokenizer: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_asked(word_tokenizer(weights)).model
    loaded = LoadedWeights(model.config, model.state_dict(), [], tokenizer)
    monkeypatch.setattr("annotated_mpnet.explain.model.load_any", lambda path: loaded)
    monkeypatch.setattr("annotated_mpnet.explain.model.load_tokenizer", word_tokenizer)
    code, output, failed = command(SENTENCE, "--checkpoint", "a.pt")
    assert (code, output) == (2, "")
    assert said in failed


def test_files_are_written_and_only_our_own_are_replaced(tmp_path: Path) -> None:
    wanted = "$x$ שלום 👩‍🚀 sat.", "--html", tmp_path / "a.html", "--png", tmp_path / "a.png"
    code, said, _ = command(*wanted)
    assert code == 0
    assert f"wrote {tmp_path / 'a.html'}\nwrote {tmp_path / 'a.png'} (boxes: letters" in said
    assert (tmp_path / "a.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    code, said, failed = command(*wanted)
    assert code == 2
    assert said == ""
    assert "which exists; give another name, or --overwrite" in failed
    assert command(*wanted, "--overwrite")[0] == 0
    (tmp_path / "a.html").write_text("my own page")
    code, _, failed = command(*wanted, "--overwrite")
    assert code == 2
    assert "explain-mpnet did not write" in failed
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.html", "a.png"]
    assert (tmp_path / "a.html").read_text() == "my own page"


def test_a_disk_that_is_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_text("a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, failed = command("The cat sat.", "--html", tmp_path / "a.html")
    assert code == 6
    assert "could not be written" in failed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "SENTENCE is missing"),
        ([""], 2, "SENTENCE is empty"),
        (["  "], 2, "no token that could be predicted"),
        (["the cat", "--predict", "dog"], 2, "--predict has 'dog'"),
        (["cat", "--html", "nowhere/a.html"], 2, "no such directory"),
        (["cat", "--html", "."], 2, "--html is '.', which is not a file"),
        (["cat", "--html", "a", "--png", "./a"], 2, "are the same file"),
        (["cat", "--checkpoint", "/nowhere"], 4, "'/nowhere' does not exist"),
        (["cat", "--seed", "-1"], 2, "--seed is -1"),
        (["cat", "--pred-prob", "0"], 2, "--pred-prob is 0.0"),
        (["cat", "--keep-prob", "0.6", "--rand-prob", "0.6"], 2, "add up to more than 1"),
        (["cat", "--input-mode", "bert"], 2, "expected one of mpnet, mlm, plm"),
        (["cat", "--model", "a"], 2, "--model (here: --checkpoint)"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, output, failed = command(*arguments)
    assert found == code
    assert said in failed
    assert failed.count("\n") == 1
    assert output == ""
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, failed = command("The cat sat.", "--png", tmp_path / "a.png")
    assert code == 2
    assert "pip install 'annotated-mpnet[plot]'" in failed


def test_words_without_quotes_are_a_sentence() -> None:
    assert command("The", "cat", "sat.")[1] == command("The cat sat.")[1]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("text", [SENTENCE, NASTY])
@pytest.mark.parametrize("mode", MODES)
def test_pictures_hold_each_entry_and_each_score(mode: InputMode, text: str) -> None:
    explanation = explained(text, mode)
    entries = explanation.shown.entries
    (axes,) = draw(explanation).axes
    assert len(axes.get_xticks()) == len(explanation.shown.keys)
    assert len(axes.get_yticks()) == len(entries)
    (squares,) = axes.collections
    colours = [to_hex(colour) for colour in squares.get_facecolor()]
    scores = [sees for entry in entries for sees in entry.sees]
    assert colours == [SEEN if sees else HIDDEN for sees in scores]
    assert len(squares.get_paths()) == len(scores)
