"""The page: its data are the explanation, and a browser draws them."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import msgspec
import pytest
from examples import NASTY, explained, explained_by_a_model, tiny_asked

from annotated_mpnet.explain.explanation import Explanation
from annotated_mpnet.explain.page import page
from annotated_mpnet.explain.sentence import word_tokenizer
from waiting import HUNG


class Scripts(HTMLParser):
    """Reads a page as a browser does: what is in each script, and which files it asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.asked: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        self.asked += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)


@pytest.mark.parametrize("text", ["A cat sat here.", NASTY])
def test_the_data_of_the_page_are_the_explanation(text: str) -> None:
    explanation = explained(text)
    read = Scripts(page(explanation))
    assert len(read.scripts) == 2
    assert msgspec.json.decode(read.scripts[0], type=Explanation) == explanation


def test_the_data_of_the_page_hold_the_guesses_of_a_model() -> None:
    explanation = explained_by_a_model()
    (data, _) = Scripts(page(explanation)).scripts
    assert msgspec.json.decode(data, type=Explanation) == explanation


def test_the_page_asks_for_nothing() -> None:
    text = page(explained())
    assert Scripts(text).asked == []
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|innerHTML", text)


def test_the_script_of_the_page_is_small() -> None:
    template = resources.files("annotated_mpnet.explain").joinpath("page.html").read_text()
    script = template.split('"use strict";')[1].split("</script>")[0]
    assert len(script.splitlines()) < 190


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
CLICKS = Path(__file__).with_name("clicks.js").read_text(encoding="utf-8")


def clicked(explanation: Explanation, directory: Path) -> list[str]:
    """Click through a page in a browser, and return what it showed."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here (`apt install chromium`)")
    file = directory / "page.html"
    file.write_text(f"{page(explanation)}<script>{CLICKS}</script>", encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={directory / 'profile'}", file.as_uri()),
        ],
        capture_output=True,
        timeout=HUNG,
        check=True,
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout.decode(), re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    return html.unescape(found[1]).split("\n")


def test_a_browser_clicks_through_the_page(tmp_path: Path) -> None:
    explanation = explained("The cat sat on the mat.", predict="mat,sat")
    assert clicked(explanation, tmp_path) == [
        "start: To predict mat (position 6), it sees: "
        "<s> The cat <mask> on the <mask> . </s> [Prediction 1 of 2]",
        *(
            f"{what}: To predict sat (position 3), it sees: "
            "<s> The cat <mask> on the mat . </s> [Prediction 2 of 2]"
            for what in ("next", "no third")
        ),
        "left: To predict mat (position 6), it sees: "
        "<s> The cat <mask> on the <mask> . </s> [Prediction 1 of 2]",
        "right: To predict sat (position 3), it sees: "
        "<s> The cat <mask> on the mat . </s> [Prediction 2 of 2]",
        "content: Content at position 6, mat, which may know 1 of the predicted tokens, sees: "
        "<s> The cat <mask> on the mat . </s> [Prediction 2 of 2]",
        "hover: The masked sentence at position 2, cat, which may know 0 of the predicted tokens, "
        "sees: <s> The cat <mask> on the <mask> . </s> [Prediction 2 of 2]",
        "focus: To predict mat (position 6), it sees: "
        "<s> The cat <mask> on the <mask> . </s> [Prediction 1 of 2]",
        "focused: 11",
        "seen: <s> The cat <mask> on the <mask> . </s>",
        "mlm: To predict sat (position 3), it sees: "
        "<s> The cat <mask> on the <mask> . </s> [Prediction 2 of 2]",
        "plm: To predict sat (position 3), it sees: "
        "<s> The cat -- on the mat . </s> [Prediction 2 of 2]",
        "cells: 8",
        "buckets: bucket 3|bucket 2|bucket 1||bucket 17|bucket 18|bucket 19|bucket 20|bucket 21",
    ]


def test_a_browser_shows_any_letters_and_the_guesses_of_a_model(tmp_path: Path) -> None:
    asked = tiny_asked(word_tokenizer(NASTY))
    explanation = explained(NASTY, predict="script,שלום,alert", asked=asked)
    shown = clicked(explanation, tmp_path)
    objective = explanation.shown
    sees = " ".join(
        str(key and key.reads) + "?" * (explanation.tokens[i].kind in ("random", "kept"))
        for i, key in enumerate(objective.seen_by(objective.predictions[0].entry))
    )
    assert f"start: To predict script (position 3), it sees: {sees} [Prediction 1 of 3]" in shown
    assert not [line for line in shown if line.startswith("error")]

    # The clicks end at the third prediction of plm, with the second head of the last layer.
    objective = explanation.objectives["plm"]
    prediction = objective.predictions[2]
    assert shown[-1] == "guesses: " + "|".join(each.token for each in prediction.answer.guesses)
    told = shown[-2].removeprefix("attention: ").split("|")
    sees_key = objective.entries[prediction.entry].sees
    for text, weight, seen in zip(told, prediction.answer.attention[-1][1], sees_key, strict=True):
        assert (text != "") == seen
        assert not seen or float(text.removesuffix("%")) == pytest.approx(weight / 10, abs=0.51)
