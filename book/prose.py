"""Prose and code as HTML: Markdown, formulas, colours, and a link from each name.

The annotation writes formulas in plain text. Here L^2 gets a raised 2, x_z1 a lowered z1, and tau
is a Greek letter. The style sheet alone does it: what is copied, searched or read aloud is still
the plain text.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.lexers import PythonLexer, get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

SIGNS = {"<=": "≤", ">=": "≥", "sqrt": "√", "tau": "τ", "pi": "π", "beta": "β"}
SIGNS |= {"beta1": "β₁", "beta2": "β₂"}
INLINE = re.compile(
    r"(?P<file>(?<![\w/.-])(?:[\w-]+/)*[\w-]+\.(?:py|md)\b|(?<![\w/.-])(?:[a-z_]+/)+(?=[\s,;:)]))"
    r"|(?P<sign><=|>=|\b(?:sqrt|tau|pi|beta[12]?)\b)"
    r"|(?<=[\w)\]])\^(?P<sup>-?\w+)"
    r"|(?:(?<=\b[a-zA-Z])|(?<=\]))_(?P<sub>[a-z]\d(?:\.\.\w\w)?)\b"
    r"|(?P<gap>  )(?= *\S)|(?P<end>\n)"
)

Find = Callable[[str, bool], str | None]
"""From a name in prose (of a file or, if true, of code) to the address of its definition."""
Rewrite = Callable[[str], str]
"""From the address of a link or an image in the text to its address in the site."""


@dataclass
class Section:
    """A part of a page that the search can find: its anchor, title and text."""

    anchor: str
    title: str
    text: str = ""


def in_docstrings() -> MarkdownIt:
    """Return the parser of notes: paragraphs, lists, emphasis, code, and nothing else.

    A line of prose may begin with any character, and a backslash is a backslash.
    """
    parser = MarkdownIt("commonmark", {"html": False})
    return parser.disable(
        ["heading", "lheading", "hr", "blockquote", "reference", "escape", "entity", "autolink"]
    )


def in_documents() -> MarkdownIt:
    """Return the parser of Markdown files: GitHub's, as far as they use it."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def slug(title: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    kept = [c for c in title.strip().lower() if c in "-_ " or unicodedata.category(c)[0] in "LNM"]
    return "".join(kept).replace(" ", "-")


def plain(text: str) -> str:
    """Return Markdown without its marks, on one line."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"\*\*|(?<!\w)\*|\*(?!\w)|`", "", re.sub("<[^>]+>", "", text)).split())


def link(address: str | None, inside: str) -> str:
    """Return HTML with a link around it, if there is an address."""
    return f'<a href="{html.escape(address)}">{inside}</a>' if address else inside


def formulas(text: str, find: Find) -> str:
    """Return plain text as HTML, with links from file names and the signs of mathematics.

    What a line saves in width goes into its next gap, so columns stay columns.
    """
    out, end, saved = [], 0, 0.0
    for match in INLINE.finditer(text):
        out.append(html.escape(text[end : match.start()]))
        end = match.end()
        kind, raw = match.lastgroup, html.escape(match[0])
        if kind == "file":
            out.append(link(find(match[0], False), raw))
        elif kind == "sign":
            sign = SIGNS[match[0]]
            out.append(f'<span class="sign" data-sign="{sign}">{raw}</span>')
            saved += len(match[0]) - len(sign)
        elif kind in ("sup", "sub"):
            out.append(f"<{kind}><i>{raw[0]}</i>{raw[1:]}</{kind}>")
            saved += 1 + 0.25 * (len(match[0]) - 1)
        else:
            space = f'<span style="padding-left:{saved:g}ch">{raw}</span>'
            out.append(space if kind == "gap" and saved else raw)
            saved = 0.0
    return "".join([*out, html.escape(text[end:])])


def render(
    parser: MarkdownIt,
    markdown: str,
    find: Find,
    rewrite: Rewrite,
    taken: Iterable[str] | None = None,
) -> tuple[str, list[Section]]:
    """Return Markdown as HTML, and its sections.

    Args:
        parser: of notes or of documents.
        markdown: the text.
        find: gives names their links.
        rewrite: changes the links of the text.
        taken: anchors that the page has for other things. Where they are given, a bold beginning
            of a paragraph is the title of a section, as in the book.
    """
    tokens = parser.parse(markdown)
    sections = [Section("", "")]
    pairs = [*zip(tokens, [*tokens[1:], Token("", "", 0)], strict=False)]
    headings = [plain(after.content) for token, after in pairs if token.type == "heading_open"]
    ids = {*map(slug, headings), *(taken or ())}
    used: dict[str, int] = {}
    for token, after in pairs:
        anchor = title = ""
        if token.type == "heading_open":
            title = plain(after.content)
            anchor = slug(title)
            used[anchor] = used.get(anchor, -1) + 1
            anchor += f"-{used[anchor]}" * (used[anchor] > 0)
        elif taken is not None and token.type == "paragraph_open" and token.level == 0:
            title = _bold_beginning(after.children or [])
            anchor = slug(title)
            while anchor in ids:
                anchor += "-1"
            ids.add(anchor)
        if title:
            token.attrSet("id", anchor)
            sections.append(Section(anchor, title))
        if token.type == "inline":
            sections[-1].text += " " + plain(token.content)
            _finish_inline(token.children or [], find, rewrite)
        elif token.type in ("fence", "code_block"):
            sections[-1].text += " " + " ".join(token.content.split())
            language = token.info.split()[0] if token.info.strip() else ""
            shown = colours(token.content, language) if language else None
            token.content = f"<pre>{shown or formulas(token.content, find)}</pre>\n"
            token.type = "html_block"
        elif token.type == "html_block":
            token.content = _rewrite_html(token.content, rewrite)
    return parser.renderer.render(tokens, parser.options, {}), sections


def _bold_beginning(children: list[Token]) -> str:
    texts = [""]
    for child in children:
        if child.type == "strong_open" and not texts[0]:
            texts.append("")
        elif child.type == "strong_close":
            return "".join(texts).rstrip(".:?")
        texts[-1] += child.content
    return ""


def _finish_inline(children: list[Token], find: Find, rewrite: Rewrite) -> None:
    in_link = False
    for token in children:
        if token.type == "link_open":
            in_link = True
            token.attrSet("href", rewrite(str(token.attrGet("href"))))
        elif token.type == "link_close":
            in_link = False
        elif token.type == "image":
            token.attrSet("src", rewrite(str(token.attrGet("src"))))
        elif token.type == "html_inline":
            token.content = _rewrite_html(token.content, rewrite)
        elif token.type == "text":
            token.content = formulas(token.content, (lambda *_: None) if in_link else find)
            token.type = "html_inline"
        elif token.type == "code_inline":
            is_code = not re.search(r"/|\.(py|md)$", token.content)
            address = None if in_link else find(token.content, is_code)
            token.content = link(address, f"<code>{html.escape(token.content)}</code>")
            token.type = "html_inline"


def _rewrite_html(text: str, rewrite: Rewrite) -> str:
    def attribute(match: re.Match[str]) -> str:
        return f'{match[1]}="{html.escape(rewrite(html.unescape(match[2])))}"'

    return re.sub(r'\b(src|href)="([^"]*)"', attribute, text)


def colours(text: str, language: str) -> str | None:
    """Return code in colours; None if the language is unknown."""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return None
    return "".join(coloured(kind, value) for kind, value in lexer.get_tokens(text))


def coloured(kind: Any, value: str, address: str | None = None) -> str:
    """Return a token of code as HTML."""
    while kind not in STANDARD_TYPES:
        kind = kind.parent
    style, shown = STANDARD_TYPES[kind], link(address, html.escape(value))
    return f'<span class="{style}">{shown}</span>' if style else shown


def code_lines(text: str, addresses: dict[tuple[int, int], tuple[str, str]]) -> list[str]:
    """Return each line of a Python file in colours, with its links.

    Args:
        text: the file.
        addresses: from line and column to a name there and its address.
    """
    lines, column = [""], 0
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        for part in re.split("(\n)", value):
            if part == "\n":
                lines.append("")
                column = 0
            elif part:
                name, address = addresses.get((len(lines), column), ("", None))
                lines[-1] += coloured(kind, part, address if name == part else None)
                column += len(part)
    return lines
