"""The annotated site of `make book`: complete, in order, linked, and without any network."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from posixpath import dirname, join, normpath

import pytest

from annotated_mpnet import mpnet
from count_lines import docstrings

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "book"))

import make_book  # noqa: E402
from make_book import BrokenLinkError, Page, Site  # noqa: E402
from prose import formulas  # noqa: E402
from source import Source, to_markdown  # noqa: E402

VOID = {"br", "hr", "img", "input", "link", "meta"}
INSIDE_WORDS = {"a", "b", "code", "em", "i", "span", "strong", "sub", "sup"}


class Parsed(HTMLParser):
    """A page as a browser sees it.

    Attributes:
        problems: tags that are not closed in order.
        ids: all anchors.
        links: (tag, attribute, address, the text inside, rel).
        words: all words, in order, each with a space before and after it.
        lines: the text of each line of code.
        defined: the number of the line that an anchor is in.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str, str, list[str], str]] = []
        self.lines: dict[int, list[str]] = {}
        self.defined: dict[str, int] = {}
        self._open: list[tuple[str, str]] = []
        self._text: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag, _ in self._open]
        self.words = words("".join(self._text))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if "id" in given:
            self.ids.append(given["id"])
            if re.fullmatch(r"L\d+", given["id"]):
                self.lines[int(given["id"][1:])] = []
            elif self.lines and self._in("line"):
                self.defined[given["id"]] = max(self.lines)
        for name in {"href", "src"} & given.keys():
            self.links.append((tag, name, given[name], [], given.get("rel", "")))
        if tag not in VOID:
            self._open.append((tag, given.get("class", "")))
        if tag not in INSIDE_WORDS:
            self._text.append(" ")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        if tag not in INSIDE_WORDS:
            self._text.append(" ")
        opened = self._open.pop()[0] if self._open else "nothing"
        if opened != tag:
            self.problems.append(f"</{tag}> closes <{opened}>")

    def handle_data(self, data: str) -> None:
        self._text.append(data)
        if self._in("line") and not self._in("number"):
            self.lines[max(self.lines)].append(data)
        if self.links and any(tag == "a" for tag, _ in self._open):
            self.links[-1][3].append(data)

    def _in(self, name: str) -> bool:
        return any(style == name for _, style in self._open)


class Built:
    """The site of this repository."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.site = make_book.build(out, ROOT)
        self.pages = {
            file.relative_to(out).as_posix(): Parsed(file.read_text(encoding="utf-8"))
            for file in out.rglob("*.html")
        }

    def target(self, page: str, address: str) -> tuple[str, str]:
        """Return the file and the anchor that an address leads to."""
        path, _, anchor = address.partition("#")
        return (normpath(join(dirname(page), path)) if path else page), anchor

    def page_of(self, path: str) -> Parsed:
        return self.pages[self.site.pages[PurePosixPath(path)].url]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("book") / "out")


def sources() -> Iterator[Path]:
    yield from (file.relative_to(ROOT) for file in sorted(ROOT.glob("src/**/*.py")))


def words(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", text), ""])


def test_every_link_and_every_anchor_exists(built: Built) -> None:
    broken = []
    for page, parsed in built.pages.items():
        for tag, _, address, _, _ in parsed.links:
            if tag == "a" and re.match(r"https?:", address):
                continue
            file, anchor = built.target(page, address)
            if not (built.out / file).is_file():
                broken.append(f"{page}: {address}")
            elif anchor and anchor not in built.pages[file].ids:
                broken.append(f"{page}: {address}: no such anchor")
    assert not broken


def test_anchors_are_unique_and_tags_are_balanced(built: Built) -> None:
    for page, parsed in built.pages.items():
        assert not parsed.problems, page
        assert len(parsed.ids) == len(set(parsed.ids)), page


def test_nothing_is_loaded_from_the_network(built: Built) -> None:
    for page, parsed in built.pages.items():
        loaded = [address for tag, _, address, _, _ in parsed.links if tag != "a"]
        # The interactive page has everything in itself.
        assert loaded or page == make_book.INTERACTIVE, page
        assert not [address for address in loaded if ":" in address or address.startswith("//")]
    assert "url(" not in (built.out / "style.css").read_text()
    assert "@import" not in (built.out / "style.css").read_text()
    script = (built.out / "search.js").read_text()
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|sendBeacon", script)


def test_book_comes_first_and_in_its_own_order(built: Built) -> None:
    assert mpnet.__doc__
    told = re.search(r"in this order: ([^.]*)\.", mpnet.__doc__)
    assert told
    chapters = ["__init__", *re.findall(r"\w+", told[1])]
    files = {file.stem for file in (ROOT / "src/annotated_mpnet/mpnet").glob("*.py")}
    assert files == {*chapters, "config"}
    visited, page = [], "index.html"
    while following := [link for link in built.pages[page].links if link[4] == "next"]:
        page, _ = built.target(page, following[0][2])
        visited.append(page)
        back = [link[2] for link in built.pages[page].links if link[4] == "prev"]
        assert len(visited) == 1 or built.target(page, back[0])[0] == visited[-2]
    expected = [f"mpnet/{name}.html" for name in [*chapters, "config"]]
    assert visited[: len(expected)] == expected
    documents = {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")}
    assert len(visited) == len(set(visited)) == len([*sources()]) + len(documents)


def test_index_names_every_page(built: Built) -> None:
    listed = {built.target("index.html", link[2])[0] for link in built.pages["index.html"].links}
    assert listed >= set(built.pages)


def test_all_prose_of_a_file_is_on_its_page(built: Built) -> None:
    for file in sources():
        text = (ROOT / file).read_text(encoding="utf-8")
        shown = built.page_of(str(file)).words
        for node in docstrings(ast.parse(text)):
            assert isinstance(node.value, ast.Constant)
            unnumbered = re.sub(r"(?m)^ *\d+\. ", "", str(node.value.value))
            assert words(unnumbered) in shown, (file, node.lineno)
        for comment in re.findall(r"(?m)^ *# (.*)", text):
            assert words(comment) in shown, (file, comment)


def test_all_code_of_a_file_is_on_its_page_line_by_line(built: Built) -> None:
    for file in sources():
        text = (ROOT / file).read_text(encoding="utf-8")
        prose = {
            line
            for node in docstrings(ast.parse(text))
            for line in range(node.lineno, (node.end_lineno or 0) + 1)
        }
        shown = built.page_of(str(file)).lines
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.strip().startswith("#") and number not in prose:
                assert "".join(shown[number]).removesuffix("\n") == line, (file, number)


def test_names_in_code_lead_to_a_line_that_defines_them(built: Built) -> None:
    checked = 0
    for file in sources():
        page = built.site.pages[PurePosixPath(file)].url
        for tag, _, address, inside, _ in built.pages[page].links:
            target, anchor = built.target(page, address)
            defined = built.pages.get(target, built.pages[page]).defined
            if tag == "a" and anchor in defined and "mpnet/" in target:
                name = anchor.rpartition(".")[2]
                line = "".join(built.pages[target].lines[defined[anchor]])
                assert re.search(rf"\b{name}\b", line), (page, address)
                checked += "".join(inside) == name
    assert checked > 1000


@pytest.mark.parametrize(
    ("page", "text", "target"),
    [
        ("mpnet/loop.html", "Batch", "mpnet/batch.html#Batch"),
        ("mpnet/loop.html", "add_gradient", "mpnet/loop.html#Setup.add_gradient"),
        ("mpnet/loop.html", "learning_rate", "mpnet/optimizer.html#learning_rate"),
        ("mpnet/attention.html", "drop", "mpnet/dropout.html#dropout"),
        ("mpnet/collator.html", "find_words", "mpnet/masking.html#find_words"),
        ("mpnet/collator.html", "begins_word", "mpnet/collator.html#Vocabulary.begins_word"),
        ("mpnet/encoder.html", "encoder_embed_dim", "#ArchitectureConfig.encoder_embed_dim"),
        ("mpnet/encoder.html", "_feed_forward", "#SentenceEncoderLayer._feed_forward"),
        ("mpnet/two_stream.html", "mpnet/pictures.py", "mpnet/pictures.html"),
        ("mpnet/two_stream.html", "NEVER", "mpnet/two_stream.html#NEVER"),
        ("mpnet/attention.html", "fast/", "fast/__init__.html"),
        ("conversion/__init__.html", "names.py", "conversion/names.html"),
        ("README.html", "two_stream.py", "mpnet/two_stream.html"),
        ("README.html", "oracle.py", "tests/mpnet/oracle.html"),
    ],
)
def test_a_name_leads_to_its_definition(built: Built, page: str, text: str, target: str) -> None:
    found = {
        "#".join(built.target(page, address)).rstrip("#")
        for tag, _, address, inside, _ in built.pages[page].links
        if tag == "a" and "".join(inside) == text
    }
    assert any(each.endswith(target) for each in found), found


def test_a_variable_is_not_taken_for_the_function_of_its_name(built: Built) -> None:
    # `update` is a parameter here, and a function in `mpnet/loop.py`.
    links = built.pages["mpnet/optimizer.html"].links
    assert not [link for link in links if "".join(link[3]) == "update"]


def test_search_knows_every_page_and_its_anchors(built: Built) -> None:
    text = (built.out / "search-index.js").read_text(encoding="utf-8")
    entries = json.loads(text.removeprefix("const ENTRIES = ").removesuffix(";\n"))
    found = [url.partition("#") for url, *_ in entries]
    assert {page for page, _, _ in found} == set(built.pages) - {
        "index.html",
        make_book.INTERACTIVE,
    }
    assert all(not anchor or anchor in built.pages[page].ids for page, _, anchor in found)


def test_notes_are_beside_the_code_that_they_explain() -> None:
    text = '''"""Module."""
# One.

# Two,
# on two lines.
@cache
def f():
    """Docstring."""
    x = 1
    # Three.
    return x

SIZE = 3
"""A size."""
'''
    rows = Source(PurePosixPath("file.py"), text).rows()
    assert [(row.owner, row.notes, row.lines) for row in rows] == [
        ("f", ["One.", "Two,\non two lines.", "Docstring.\n"], [6, 7, 9]),
        ("", ["Three."], [11]),
        ("", ["A size.\n"], [13]),
    ]


def test_documents_are_in_the_order_in_which_they_refer_to_each_other(small: Path) -> None:
    (small / "docs/a.md").write_text("# A\n")
    (small / "docs/b.md").write_text("# B\n\n[A](a.md)\n")
    (small / "CHANGELOG.md").write_text("# Changes\n")
    (small / "README.md").write_text("# Read me\n\n[O](docs/other.md) [B](docs/b.md)\n")
    order = [page.path.name for page in Site(small).reading[2:]]
    assert order == ["README.md", "other.md", "b.md", "a.md", "CHANGELOG.md"]


# The end of the build, for mistakes in a small repository.


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for file in ("src/annotated_mpnet/__init__.py", "src/annotated_mpnet/mpnet/__init__.py"):
        (tmp_path / "repo" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / file).write_text('"""A room."""\n')
    (tmp_path / "repo/docs").mkdir()
    (tmp_path / "repo/docs/other.md").write_text("# Other\n\n## A heading\n")
    (tmp_path / "repo/README.md").write_text("# Read me\n\n[Other](docs/other.md#a-heading).\n")
    return tmp_path / "repo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x](missing.md)", "docs/page.md: link to missing.md: there is no such file"),
        ("[x](other.md#no)", "docs/page.md: link to other.md#no: no such heading or line there"),
        ("[x](#no)", "docs/page.md: link to #no: no such heading or line there"),
        ("[x](../../out.md)", "docs/page.md: link to ../../out.md: there is no such file"),
        ("![x](no.svg)", "docs/page.md: link to no.svg: there is no such file"),
        ('<img src="no.svg">', "docs/page.md: link to no.svg: there is no such file"),
        ("![x](https://a.b/c.svg)", "docs/page.md: https://a.b/c.svg would load from the network"),
    ],
)
def test_a_broken_link_ends_the_build_with_one_line(
    small: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (small / "docs/page.md").write_text(f"# Page\n\n{text}\n")
    monkeypatch.setattr(make_book, "ROOT", small)
    monkeypatch.setattr(sys, "argv", ["make_book.py"])
    with pytest.raises(SystemExit) as ended:
        make_book.main()
    assert ended.value.code == message
    assert not (small / "build").exists()


def test_all_broken_links_are_told_at_once(small: Path) -> None:
    (small / "docs/page.md").write_text("# Page\n\n[x](a.md) [y](b.md)\n")
    with pytest.raises(BrokenLinkError) as error:
        make_book.build(small / "build", small)
    assert str(error.value).count("\n") == 1


def test_only_a_directory_of_its_own_is_replaced(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_book, "ROOT", small)
    monkeypatch.setattr(sys, "argv", ["make_book.py", str(small / "docs")])
    with pytest.raises(SystemExit, match="is not this site"):
        make_book.main()
    monkeypatch.setattr(sys, "argv", ["make_book.py"])
    make_book.main()
    (small / "docs/other.md").write_text("# Other\n\n## A heading\n\n```nonsense\n<b>\n```\n")
    make_book.main()
    assert "&lt;b&gt;" in (small / "build/book/docs/other.html").read_text()
    assert capsys.readouterr().out.count("5 pages: ") == 2


def test_address_of_a_page_depends_on_its_file_alone() -> None:
    for path, url in {
        "src/annotated_mpnet/mpnet/batch.py": "mpnet/batch.html",
        "src/annotated_mpnet/cli.py": "cli.html",
        "docs/log.md": "docs/log.html",
        "LICENSE": "LICENSE.html",
        "examples/slurm.sh": "examples/slurm.sh.html",
    }.items():
        assert Page(PurePosixPath(path), "").url == url


def test_addresses_of_pages_differ(built: Built) -> None:
    assert len({page.url for page in built.site.pages.values()}) == len(built.site.pages)
    assert isinstance(built.site, Site)


# Prose.


def shown(text: str) -> str:
    """Return what a reader sees, with the width of what is raised, lowered or padded."""
    seen = re.sub(
        r'<span class="sign" data-sign="(.+?)">.*?</span>', r"\1", formulas(text, no_link)
    )
    seen = re.sub(r"<i>.</i>", "", seen)
    return re.sub(r'<span style="padding-left:(.*?)ch">', r"{+\1}", seen).replace("</span>", "")


def no_link(name: str, is_code: bool) -> None:
    return None


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("1.345 L^2 scores", "1.345 L<sup>2</sup> scores"),
        ("log p(x_z1 | rest)", "log p(x<sub>z1</sub> | rest)"),
        ("k <= tau(entry)", "k ≤ τ(entry)"),
        ("sqrt(v) and beta1^t", "√(v) and β₁<sup>t</sup>"),
        ("layer_norm_eps and num_tau and pipe", "layer_norm_eps and num_tau and pipe"),
        ("a < b & c", "a &lt; b &amp; c"),
        # What a line saves in width, its next gap gets back.
        ("k <= tau   x\nlong line  x", "k ≤ τ{+3}   x\nlong line  x"),
        ("L^2  x  y", "L<sup>2</sup>{+1.25}  x  y"),
    ],
)
def test_formulas_get_the_signs_of_mathematics(written: str, seen: str) -> None:
    assert shown(written) == seen


def test_sections_and_doctests_of_a_docstring_become_markdown() -> None:
    docstring = """Do it.

    Args:
        first: what it is,
            on two lines.
        *more: the others.

    Returns:
        The sum.

    >>> do_it(1)
    1

    Text."""
    assert to_markdown(docstring).split("\n\n") == [
        "Do it.",
        "**Args**",
        "- **first**: what it is,\n  on two lines.\n- ***more**: the others.",
        "**Returns**",
        "The sum.",
        "```pycon\n>>> do_it(1)\n1\n```",
        "Text.\n",
    ]


# In a browser.

QUESTIONS = {
    "position compensation": "mpnet/two_stream.html#the-problem",
    "why masks for predicted tokens are shown to later entries": "mpnet/two_stream.html",
    "why no query can see its own token": "mpnet/two_stream.html#why-no-query-can-see",
    "what position compensation adds over XLNet": "mpnet/two_stream.html#the-problem",
    "why the last layer is cheaper": "mpnet/encoder.html#why-the-last-layer-is-cheaper",
    "why the loss is divided as it is": "mpnet/loop.html#why-is-the-loss-divided-as-it-is",
    "cross_entropy_sum": "mpnet/pretraining.html#cross_entropy_sum",
    "asdfgh": "Nothing found.",
}


def browse(page: Path, profile: Path, query: str = "") -> str:
    """Return the page as Chromium has it after its scripts."""
    browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(browsers)} is installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command = [browser, *options, "--virtual-time-budget=20000", "--dump-dom"]
    address = page.as_uri() + query
    return subprocess.run([*command, address], capture_output=True, text=True, check=True).stdout


def test_search_answers_the_questions_of_a_reader(built: Built, tmp_path: Path) -> None:
    page = built.out / "mpnet" / "batch.html"
    script = f"""<script>addEventListener("load", async () => {{
        const answers = {{}};
        for (const question of {json.dumps([*QUESTIONS])}) {{
            input.value = question;
            await show();
            const links = [...list.querySelectorAll("a")].map(each => each.getAttribute("href"));
            answers[question] = links.length ? links : [list.textContent];
        }}
        document.documentElement.textContent = JSON.stringify(answers);
    }});</script>"""
    asking = built.out / "mpnet" / "asking.html"
    asking.write_text(page.read_text(encoding="utf-8") + script, encoding="utf-8")
    try:
        answered = re.search(r"\{.*\}", browse(asking, tmp_path))
    finally:
        asking.unlink()
    assert answered
    for question, links in json.loads(answered[0]).items():
        assert any(QUESTIONS[question] in link for link in links[:5]), (question, links)


def test_search_box_appears_only_where_it_works(built: Built, tmp_path: Path) -> None:
    # Without a script there is none; and a search can be sent as a link.
    assert '<form role="search" hidden>' in (built.out / "index.html").read_text(encoding="utf-8")
    seen = browse(built.out / "index.html", tmp_path, "?q=position+compensation")
    assert '<form role="search">' in seen
    assert "which XLNet lacks (position compensation)" in seen
