"""A Python file, taken apart for its page: notes beside code, and where each name is defined.

A *note* is a docstring or a comment that has its line to itself. Each note belongs to the code that
it explains: a docstring to the `def`, the text below a field to the field, a comment to what comes
after it. So a page is a list of *rows*, each with the notes at the left and their code at the
right.

`Names` knows what the files define. It follows imports, inheritance, `self`, and parameters with an
annotation; a name that it cannot follow for certain gets no link.
"""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

PACKAGE = "annotated_mpnet"
PRAGMA = re.compile(r"#\s*(fmt|type|ruff|mypy|noqa)\b")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
ENTRY = re.compile(r"([\w*][\w., *]*): (.*)")

Scope = dict[str, str | None]
"""What a name means: a dotted name, "=" and the class that it is an instance of, or None."""


@dataclass
class Row:
    """Notes, as Markdown, and the numbers of the code lines beside them."""

    notes: list[str] = field(default_factory=list)
    owner: str = ""
    lines: list[int] = field(default_factory=list)


class Source:
    """A Python file of the repository.

    Attributes:
        path: in the repository.
        module: its dotted name; a file outside the package has its path as name.
        defines: the line of each function, class, variable, method and field: `Class.method`.
        bases: the base classes of each class, as dotted names.
        types: the class of each field that has one in its annotation.
        scope: the global names: what they mean.
    """

    def __init__(self, path: PurePosixPath, text: str) -> None:
        self.path, self.text = path, text
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        parts = path.with_suffix("").parts
        parts = parts[parts.index(PACKAGE) :] if PACKAGE in parts else ("/".join(parts),)
        self.module = ".".join(parts).removesuffix(".__init__")
        self.docstring = ast.get_docstring(self.tree) or ""
        self.defines: dict[str, int] = {}
        self.types: dict[str, str] = {}
        self.scope = bindings(self.tree.body, {})
        for name in [name for name, meaning in self.scope.items() if meaning is None]:
            self.scope[name] = f"{self.module}.{name}"
        self._define(self.tree.body, "")
        self.bases = {
            node.name: [meaning for base in node.bases if (meaning := dotted(base, [self.scope]))]
            for node in self.tree.body
            if isinstance(node, ast.ClassDef)
        }

    def _define(self, body: list[ast.stmt], owner: str) -> None:
        for node in body:
            for name in bound_by(node):
                self.defines.setdefault(owner + name, node.lineno)
            if isinstance(node, ast.AnnAssign) and (kind := dotted(node.annotation, [self.scope])):
                self.types[owner + ast.unparse(node.target)] = kind
            elif isinstance(node, ast.If | ast.Try):
                self._define(node.body, owner)
            elif isinstance(node, ast.ClassDef):
                self._define(node.body, f"{owner}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and owner:
                stored = [a for a in ast.walk(node) if isinstance(a, ast.Attribute)]
                for each in (a for a in stored if isinstance(a.ctx, ast.Store)):
                    if isinstance(each.value, ast.Name) and each.value.id == "self":
                        self.defines.setdefault(owner + each.attr, each.lineno)

    def rows(self) -> list[Row]:
        """Return the rows, without the module's docstring."""
        rows, hidden = {1: Row()}, set[int]()
        first = self.tree.body[0] if self.tree.body else None
        if self.docstring and first is not None:
            hidden.update(range(1, (first.end_lineno or 1) + 1))
        docstrings = [*self._docstrings(self.tree.body, "")]
        for _, _, string in docstrings:
            if string is not None:
                hidden.update(range(string.lineno, (string.end_lineno or 0) + 1))
        comments = self._comments()
        hidden.update(comments)
        for line, comment in comments.items():
            if line - 1 in comments:
                continue
            while line + 1 in comments:
                line += 1
                comment += "\n" + comments[line]
            line += 1
            while line in hidden or (line <= len(self.lines) and not self.lines[line - 1].strip()):
                line += 1
            rows.setdefault(line, Row()).notes.append(comment)
        for line, owner, string in docstrings:
            row = rows.setdefault(line, Row())
            row.owner = row.owner or owner
            if string is not None:
                row.notes.append(to_markdown(string.value.value))  # type: ignore[attr-defined]
        starts = sorted(rows)
        for start, end in zip(starts, [*starts[1:], len(self.lines) + 1], strict=True):
            lines = [n for n in range(start, end) if n not in hidden]
            full = [n for n in lines if self.lines[n - 1].strip()]
            rows[start].lines = [n for n in lines if full and full[0] <= n <= full[-1]]
        return [row for _, row in sorted(rows.items()) if row.notes or row.lines]

    def _docstrings(
        self, body: list[ast.stmt], owner: str
    ) -> Iterator[tuple[int, str, ast.stmt | None]]:
        """Yield where the code of each docstring begins, and the class or function it is in."""
        for previous, node in zip([None, *body], body, strict=False):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                inside = f"{owner}.{node.name}".lstrip(".")
                string = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
                if string or not owner:
                    yield start, inside, string
                yield from self._docstrings(node.body[1:] if string else node.body, inside)
            elif is_string(node) and previous is not None:
                yield previous.lineno, owner, node
            elif hasattr(node, "body"):
                yield from self._docstrings(node.body, owner)

    def _comments(self) -> dict[int, str]:
        """Return the text of each line that is only a comment."""
        return {
            token.start[0]: token.string[1:].removeprefix(" ")
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type == tokenize.COMMENT
            and not token.line[: token.start[1]].strip()
            and not PRAGMA.match(token.string)
        }

    def references(self) -> dict[tuple[int, int], tuple[str, str]]:
        """Return the names that are used: (line, column) to the name and what it means."""
        found: dict[tuple[int, int], tuple[str, str]] = {}

        def add(line: int, column: int, name: str, meaning: str | None) -> None:
            # The syntax tree counts bytes.
            column = len(self.lines[line - 1].encode()[:column].decode())
            if meaning is not None and not meaning.startswith("="):
                found[line, column] = name, meaning

        def visit(node: ast.AST, scopes: list[Scope]) -> None:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                add(node.lineno, node.col_offset, node.id, dotted(node, scopes))
            elif isinstance(node, ast.Attribute):
                line, end = node.end_lineno or 0, node.end_col_offset or 0
                add(line, end - len(node.attr.encode()), node.attr, dotted(node, scopes))
            elif isinstance(node, ast.ImportFrom) and node.module:
                add(node.lineno, node.col_offset + len("from "), node.module, node.module)
                for alias in node.names:
                    meaning = f"{node.module}.{alias.name}"
                    add(alias.lineno, alias.col_offset, alias.name, meaning)
            elif isinstance(node, ast.ClassDef):
                scopes = [*scopes, {"": f"={self.module}.{node.name}"}]
            elif isinstance(node, ast.FunctionDef | ast.Lambda):
                inner = parameters(node, scopes)
                if not isinstance(node, ast.Lambda):
                    for outer in (*node.decorator_list, node.args, node.returns):
                        if outer is not None:
                            visit(outer, scopes)
                    inner = bindings(node.body, inner)
                for part in node.body if isinstance(node.body, list) else [node.body]:
                    visit(part, [*scopes, inner])
                return
            for child in ast.iter_child_nodes(node):
                visit(child, scopes)

        visit(self.tree, [self.scope])
        return found


def is_string(node: ast.AST) -> bool:
    """Return whether a statement is only a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def bound_by(node: ast.AST) -> list[str]:
    """Return the names that a statement defines by itself."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    inside = [each for target in targets if target is not None for each in ast.walk(target)]
    return [each.id for each in inside if isinstance(each, ast.Name)]


def bindings(body: list[ast.stmt], scope: Scope) -> Scope:
    """Add to a scope what its statements bind: imports with their meaning, the rest without."""
    for node in body:
        parts = [node] if isinstance(node, ast.FunctionDef | ast.ClassDef) else ast.walk(node)
        for each in parts:
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                scope[each.id] = None
            elif isinstance(each, ast.ImportFrom):
                scope |= {a.asname or a.name: f"{each.module}.{a.name}" for a in each.names}
            elif isinstance(each, ast.Import):
                scope |= {a.asname or a.name: a.name for a in each.names}
            elif isinstance(each, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs):
                scope[each.name or ""] = None
    return scope


def parameters(node: ast.FunctionDef | ast.Lambda, scopes: list[Scope]) -> Scope:
    """Return what the parameters are: instances of the classes in their annotations."""
    arguments = node.args
    scope: Scope = {}
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        meaning = dotted(each.annotation, scopes) if each.annotation else None
        scope[each.arg] = f"={meaning}" if meaning else None
    if "self" in scope and "" in scopes[-1]:
        scope["self"] = scopes[-1][""]
    scope.update({each.arg: None for each in (arguments.vararg, arguments.kwarg) if each})
    return scope


def dotted(node: ast.AST, scopes: list[Scope]) -> str | None:
    """Return the full name of what a name or an attribute means, if that is certain."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # an annotation in quotes
        return next((s[node.value] for s in reversed(scopes) if node.value in s), None)
    if isinstance(node, ast.Name):
        return next((s[node.id] for s in reversed(scopes) if node.id in s), None)
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value, scopes)):
        return f"{owner.removeprefix('=')}.{node.attr}"
    return None


def to_markdown(docstring: str) -> str:
    """Return a docstring as Markdown: doctests become fences, Google's sections become lists."""
    markdown: list[str] = []
    section, fence = "", None
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if fence is not None and not line.strip():
            markdown.append(f"{fence}```")
            fence = None
        elif fence is None and line.lstrip().startswith(">>>"):
            markdown.append(f"{indent}```pycon")
            fence = indent
        if line.strip() and not indent:
            section = ""
        if match := SECTION.fullmatch(line):
            section = match[1]
            line = f"**{section}**\n"
        elif section:
            line = line[4:]
            if section not in ("Returns", "Yields"):
                # The names of arguments get no link: another thing may have the same name.
                mark = "**" if section == "Args" else "`"
                match = ENTRY.fullmatch(line)
                line = f"- {mark}{match[1]}{mark}: {match[2]}" if match else line[2:]
        markdown.append(line)
    return "\n".join(markdown)


class Names:
    """What all files of the package define."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.modules = {source.module: source for source in sources}
        homes: dict[str, list[str]] = {}
        for source in self.modules.values():
            for name in source.defines:
                homes.setdefault(name, []).append(f"{source.module}.{name}")
        # What prose may call by its name alone: what cannot be mistaken for a common word.
        self.famous = {
            name: homes[name][0]
            for name in homes
            if len(homes[name]) == 1 and re.search("[a-z][A-Z]|._", name.rpartition(".")[2])
        }

    def find(self, name: str) -> tuple[Source, str] | None:
        """Return the file that defines a dotted name, and the name in it ("": the file itself)."""
        if name in self.modules:
            return self.modules[name], ""
        module, _, inside = name.rpartition(".")
        while module and module not in self.modules:
            module, _, first = module.rpartition(".")
            inside = f"{first}.{inside}"
        if not module:
            return None
        source = self.modules[module]
        if inside in source.defines:
            return source, inside
        first, _, rest = inside.partition(".")
        meaning = source.scope.get(first)
        if meaning and meaning != f"{module}.{first}":  # imported there
            return self.find(f"{meaning}.{rest}".rstrip("."))
        owner, _, attribute = rest.partition(".")
        kind = source.types.get(f"{first}.{owner}")
        if kind and attribute:
            return self.find(f"{kind}.{attribute}")
        inherited = (self.find(f"{base}.{rest}") for base in source.bases.get(first, []) if rest)
        return next(filter(None, inherited), None)

    def find_in_prose(
        self, text: str, source: Source | None, owner: str
    ) -> tuple[Source, str] | None:
        """Return what a name in prose means, in a note of `owner` in `source`."""
        name = text.removesuffix("()")
        candidates = [self.famous.get(name, "")]
        if source is not None:
            first, _, rest = name.partition(".")
            meaning = source.scope.get(first) or f"{source.module}.{first}"
            candidates.insert(0, f"{meaning}.{rest}".rstrip("."))
            parts = owner.split(".") if owner else []
            for length in range(1, len(parts) + 1):
                candidates.insert(0, ".".join([source.module, *parts[:length], name]))
        return next(filter(None, map(self.find, candidates)), None)
