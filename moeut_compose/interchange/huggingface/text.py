"""Source as text: where things stand in it, what it looks like after edits, which names it reads."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterable, Iterator
from itertools import accumulate

Edit = tuple[int, int, str]
"""A span of a text, from and to, and what stands there instead."""


class Lines:
    """A text in bytes, as the parser counts."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.starts = [0, *accumulate(len(line) for line in self.text.splitlines(keepends=True))]

    def span(self, node: ast.expr) -> tuple[int, int]:
        """From where to where an expression goes."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def whole(self, first: ast.stmt, last: ast.stmt) -> tuple[int, int]:
        """The lines of statements, with decorators."""
        decorators = getattr(first, "decorator_list", [])
        begin = min(node.lineno for node in (first, *decorators))
        assert last.end_lineno is not None
        return self.starts[begin - 1], self.starts[last.end_lineno]

    def name(self, node: ast.FunctionDef | ast.ClassDef) -> tuple[int, int]:
        """The name that a definition gives."""
        start = self.text.index(b" ", self.starts[node.lineno - 1] + node.col_offset) + 1
        return start, start + len(node.name.encode())

    def edited(self, start: int, end: int, edits: Iterable[Edit]) -> str:
        """The text between two places after the edits, without gaps where lines were taken out."""
        text = b""
        for first, last, new in sorted(set(edits)):
            assert first >= start, "edits overlap"
            text += self.text[start:first] + new.encode()
            start = last
        return re.sub(r"\n{3,}", "\n\n", (text + self.text[start:end]).decode()).rstrip()


def grouped(imports: Iterable[str]) -> str:
    """Import statements, one for each module: whole modules, names of others, names of the file beside."""
    whole = sorted(line for line in imports if line.startswith("import "))
    names: dict[str, set[str]] = {}
    for line in imports:
        if line.startswith("from "):
            origin, _, name = line.partition(" import ")
            names.setdefault(origin, set()).add(name)
    parts = [f"{origin} import {', '.join(sorted(names[origin]))}" for origin in sorted(names)]
    parts.sort(key=lambda part: part.startswith("from ."))
    return "\n".join([*whole, *parts])


def undefined_names(text: str) -> set[str]:
    """Names that a module reads and neither it nor Python defines."""
    table = symtable.symtable(text, "modeling", "exec")
    known = {
        *dir(builtins),
        "__name__",
        *(
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
        ),
    }
    return set(_globals(table)) - known


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _globals(child)
