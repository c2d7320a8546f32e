"""Build the annotated site from the sources: `make book`, or `python book/make_book.py [DIR]`.

A page for each file: the book in reading order, the other rooms, the documentation, and the files
that these refer to. A link in a Markdown file that leads nowhere ends the build with a line for it.
"""

import argparse
import html
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from annotated_mpnet.explain.explanation import explain
from annotated_mpnet.explain.page import page as interactive_page
from annotated_mpnet.explain.sentence import word_tokenizer
from annotated_mpnet.mpnet.config import ObjectiveConfig
from prose import Section, code_lines, in_docstrings, in_documents, plain, render
from source import Names, Row, Source, to_markdown

ROOT = Path(__file__).parents[1]
PACKAGE = PurePosixPath("src/annotated_mpnet")
# From the ground up, as in the README. A room that is not named here comes after them.
ROOMS = [
    "explain",
    "fast",
    "settings",
    "files",
    "text",
    "streams",
    "training",
    "checkpoints",
    "tracking",
    "conversion",
    "runs",
    "demo",
]
NOTE_COLUMNS = 56
"""Letters of a picture that fit beside the code."""
EXAMPLE, PREDICTED = "The cat sat on the mat.", "mat, sat"
INTERACTIVE = "who-sees-whom.html"
# What is copied as it is, and may be shown by a page.
PICTURES = {".svg", ".png", ".jpg", ".gif", ".html"}
NETWORK = re.compile(
    r'<(?:img|script|iframe|source|link)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]*)"'
)

Prose = Callable[[str, str], tuple[str, list[Section]]]


class BrokenLinkError(Exception):
    """Links lead nowhere, or would load from the network: a line for each."""


@dataclass
class Page:
    """A page of the site.

    Attributes:
        path: of the file, in the repository.
        group: the part of the index that lists it.
        title: its name in lists.
        about: a line about it.
        body: HTML.
        sections: for the search and the page's contents.
    """

    path: PurePosixPath
    group: str
    title: str = ""
    about: str = ""
    body: str = ""
    sections: list[Section] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Return its address in the site, which depends on the name of the file only."""
        path = self.path.relative_to(PACKAGE) if PACKAGE in self.path.parents else self.path
        return str(path.with_suffix(".html") if path.suffix in (".py", ".md") else f"{path}.html")

    def to(self, url: str) -> str:
        """Return the address of another page, as seen from this one."""
        return os.path.relpath(url, PurePosixPath(self.url).parent)


class Site:
    """All pages, in reading order, and what they refer to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pages: dict[PurePosixPath, Page] = {}
        self.copies: set[PurePosixPath] = set()
        self.sources = {path: self._read(path) for path in self._in_order()}
        self.names = Names(self.sources.values())
        self.errors: list[str] = []
        self.anchored: list[tuple[Page, str, Page, str]] = []
        self.templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        for path in self.sources:
            folder = path.parent.relative_to(PACKAGE)
            self.pages[path] = Page(path, f"{folder}/" if folder.name else f"{PACKAGE.name}/")
        self.reading = [*self.pages.values()]
        for path in self._documents_in_order():
            self.pages[path] = Page(path, "Documentation")
            self.reading.append(self.pages[path])

    def _read(self, path: PurePosixPath) -> Source:
        return Source(path, (self.root / path).read_text(encoding="utf-8"))

    def _in_order(self) -> list[PurePosixPath]:
        """Return the files of the package: room after room, each in the order it gives itself."""
        package = self.root / PACKAGE
        rooms = {file.parent.name for file in package.glob("*/__init__.py")} - {"mpnet"}
        known = [room for room in ROOMS if room in rooms]
        folders = [package / room for room in ["mpnet", *known, *sorted(rooms - {*known}), ""]]
        files = []
        for folder in folders:
            text = (folder / "__init__.py").read_text(encoding="utf-8")
            text = text.partition("\n")[2].rpartition("this order:")[2]

            def rank(file: Path, text: str = text) -> tuple[float, str]:
                match = re.search(rf"\b{file.stem}\b", text)
                return (match.start() if match else len(text)), file.name

            rest = sorted((f for f in folder.glob("*.py") if f.stem != "__init__"), key=rank)
            files += [folder / "__init__.py", *rest]
        return [PurePosixPath(file.relative_to(self.root).as_posix()) for file in files]

    def _documents_in_order(self) -> list[PurePosixPath]:
        """Return README.md, then the Markdown files that it refers to, then those that they do."""
        files = [*sorted(self.root.glob("docs/**/*.md")), *sorted(self.root.glob("*.md"))]
        order = [self.root / "README.md"]
        for file in order:
            targets = re.findall(r"\]\(([^)#]+\.md)", file.read_text(encoding="utf-8"))
            linked = [Path(os.path.normpath(file.parent / target)) for target in targets]
            order += [each for each in dict.fromkeys(linked) if each in files and each not in order]
        order += [file for file in files if file not in order]
        return [PurePosixPath(file.relative_to(self.root).as_posix()) for file in order]

    def render(self) -> None:
        """Render all pages, and those that they refer to."""
        done: set[PurePosixPath] = set()
        while waiting := [page for page in self.pages.values() if page.path not in done]:
            for page in waiting:
                done.add(page.path)
                if page.path.suffix == ".py":
                    self._render_source(page)
                else:
                    self._render_document(page)
                if match := NETWORK.search(page.body):
                    self.errors.append(f"{page.path}: {match[1]} would load from the network")
        for page, target, to, anchor in self.anchored:
            if f'id="{html.escape(anchor)}"' not in to.body:
                self.errors.append(f"{page.path}: link to {target}: no such heading or line there")
        if self.errors:
            raise BrokenLinkError("\n".join(self.errors))

    def _render_source(self, page: Page) -> None:
        source = self.sources.get(page.path) or self._read(page.path)
        notes = in_docstrings()

        def find(owner: str, name: str, is_code: bool) -> str | None:
            found = self.names.find_in_prose(name, source, owner) if is_code else None
            return self._address(page, *found) if found else self._file(page, name)

        def prose(
            text: str, owner: str = "", taken: Iterable[str] | None = None
        ) -> tuple[str, list[Section]]:
            return render(notes, text, partial(find, owner), partial(self._rewrite, page), taken)

        references = {
            place: (name, self._address(page, *found))
            for place, (name, meaning) in source.references().items()
            if (found := self.names.find(meaning))
        }
        code = code_lines(source.text, references)
        anchors: dict[int, list[str]] = {}
        for name, line in source.defines.items():
            anchors.setdefault(line, []).append(name)
        title, _, rest = source.docstring.partition("\n")
        page.title = page.url.removesuffix(".html") + ".py"
        page.about = prose(title)[0].removeprefix("<p>").removesuffix("</p>\n")
        chapter, page.sections = prose(to_markdown(rest), taken=source.defines)
        page.sections[0].text = plain(title) + page.sections[0].text
        rows = [self._row(row, code, anchors, prose, page) for row in source.rows()]
        template = self.templates.get_template("source.html")
        page.body = template.render(page=page, chapter=chapter, rows=rows)

    def _row(
        self, row: Row, code: list[str], anchors: dict[int, list[str]], prose: Prose, page: Page
    ) -> dict[str, object]:
        rendered = [prose(note, row.owner) for note in row.notes]
        defined = [name for line in row.lines for name in anchors.get(line, [])]
        text = " ".join(section.text for _, sections in rendered for section in sections)
        title = defined[0] if defined else row.owner
        if text or defined:
            anchor = defined[0] if defined else f"L{row.lines[0]}" if row.lines else ""
            page.sections.append(Section(anchor, title, text))
        lines = [(line, code[line - 1], anchors.get(line, [])) for line in row.lines]
        notes = "".join(note for note, _ in rendered)
        # A picture that is wider than the column of notes goes across.
        drawn = "\n".join(re.findall("<pre>(.*?)</pre>", notes, re.S))
        drawn = html.unescape(re.sub("<[^>]+>", "", drawn))
        wide = max(map(len, drawn.splitlines()), default=0) > NOTE_COLUMNS
        return {"notes": notes, "lines": lines, "wide": wide}

    def _render_document(self, page: Page) -> None:
        text = (self.root / page.path).read_text(encoding="utf-8")
        if page.path.suffix != ".md":
            language = page.path.suffix.removeprefix(".") or "text"
            text = f"# {page.path}\n\n~~~~~~{language}\n{text.rstrip()}\n~~~~~~"
        find = partial(self._find_in_document, page)
        rewrite = partial(self._rewrite, page)
        page.body, page.sections = render(in_documents(), text, find, rewrite, taken=())
        page.title = next((s.title for s in page.sections if s.title), page.url)
        paragraph = re.search(r"<p>(.*?)</p>", page.body, re.S)
        words = " ".join(re.sub(r"<[^>]+>", "", paragraph[1]).split()) if paragraph else ""
        page.about = html.unescape(re.split(r"(?<=[.?])\s", words)[0].rstrip(":"))

    def _find_in_document(self, page: Page, name: str, is_code: bool) -> str | None:
        found = self.names.find_in_prose(name, None, "") if is_code else None
        return self._address(page, *found) if found else self._file(page, name)

    def _address(self, page: Page, source: Source, name: str) -> str:
        if source.path == page.path:
            return f"#{name}"
        url = page.to(self.pages[source.path].url)
        return f"{url}#{name}" if name else url

    def _file(self, page: Page, name: str) -> str | None:
        """Return the address of a file or a room that prose names; None if there is none."""
        for folder in (page.path.parent, *((PACKAGE, PurePosixPath()) if "/" in name else ())):
            path = folder / name / ("__init__.py" if name.endswith("/") else "")
            if path in self.pages and path != page.path:
                return page.to(self.pages[path].url)
        return None

    def _rewrite(self, page: Page, target: str) -> str:
        """Return what a link of a file becomes in the site; the file gets a page if it has none."""
        address, hash_sign, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or target.startswith("//"):
            return target
        to = page
        if address:
            file = Path(os.path.normpath(self.root / page.path.parent / unquote(address)))
            file = file / "__init__.py" if file.is_dir() else file
            if not file.is_file() or self.root not in file.parents:
                self.errors.append(f"{page.path}: link to {target}: there is no such file")
                return target
            path = PurePosixPath(file.relative_to(self.root).as_posix())
            if path.suffix in PICTURES:
                self.copies.add(path)
                return page.to(str(path)) + hash_sign + anchor
            to = self.pages.setdefault(path, Page(path, "Other files"))
        if anchor:
            self.anchored.append((page, target, to, anchor))
        return (page.to(to.url) if to is not page else "") + hash_sign + anchor

    def write(self, out: Path) -> None:
        """Write all pages, the index, the search and the pictures."""
        own = Path(__file__).parent
        out.mkdir(parents=True, exist_ok=True)
        index = Page(PurePosixPath("index"), "", title="The annotated MPNet")
        groups: dict[str, list[Page]] = {}
        for page in self.pages.values():
            groups.setdefault(page.group, []).append(page)
        index.body = self.templates.get_template("index.html").render(groups=groups, page=index)
        template = self.templates.get_template("page.html")
        reading = [index, *self.reading]
        for page in [index, *self.pages.values()]:
            file = out / page.url
            file.parent.mkdir(parents=True, exist_ok=True)
            place = reading.index(page) if page in reading else len(reading)
            previous, following = ([None, *reading, None, None][place + n] for n in (0, 2))
            text = template.render(page=page, previous=previous, following=following)
            file.write_text(text, encoding="utf-8")
        shown = explain(EXAMPLE, word_tokenizer(EXAMPLE), ObjectiveConfig(), predict=PREDICTED)
        (out / INTERACTIVE).write_text(interactive_page(shown), encoding="utf-8")
        entries = [
            [f"{page.url}#{s.anchor}".rstrip("#"), page.title, s.title, s.text.strip(), page.group]
            for page in self.pages.values()
            for s in page.sections
        ]
        found = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
        (out / "search-index.js").write_text(f"const ENTRIES = {found};\n", encoding="utf-8")
        for name in ("style.css", "search.js"):
            shutil.copy(own / name, out / name)
        for path in self.copies:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / path, out / path)


def build(out: Path, root: Path) -> Site:
    """Build the site of a repository into a directory, which it replaces.

    Raises:
        BrokenLinkError: nothing is written.
    """
    site = Site(root)
    site.render()
    if out.exists():
        shutil.rmtree(out)
    site.write(out)
    return site


def main() -> None:
    """Build, and say where it is."""
    parser = argparse.ArgumentParser(description="Build the annotated site.")
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "build" / "book")
    out = parser.parse_args().directory
    is_new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_new and not (out / "search-index.js").exists():
        sys.exit(f"{out} is not this site; expected a new directory, or one that this made")
    try:
        site = build(out, ROOT)
    except BrokenLinkError as broken:
        sys.exit(str(broken))
    except OSError as error:
        sys.exit(f"{error.filename or out}: {error.strerror}")
    print(f"{len(site.pages) + 1} pages: {out / 'index.html'}")


if __name__ == "__main__":
    main()
