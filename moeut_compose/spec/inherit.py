"""A file with everything that it extends, as one tree: bases in their order, then the file itself on top."""

import os
from pathlib import Path

from moeut_compose.spec.find import SUFFIXES, Kind, NotFound, find
from moeut_compose.spec.nodes import Entry, ListNode, MapNode, Node, Scalar, lay_over
from moeut_compose.spec.problems import Place, Problem
from moeut_compose.spec.shapes import Shape
from moeut_compose.spec.yaml import parse_document, read_document


class Reader:
    """Reads a file and all that it extends, and collects what is wrong on the way."""

    def __init__(self, kind: Kind, shape: Shape) -> None:
        self.kind = kind
        self.shape = shape
        self.problems: list[Problem] = []
        self.files: list[str] = []
        self.is_partial = False
        """True when a file could not be read or found, so that keys may be missing for this reason alone."""
        self._open: list[Path] = []
        self._complained: set[Path] = set()

    def file(self, path: Path) -> MapNode | None:
        """The tree of one file with everything it extends below it; None if the file cannot be used."""
        self.files.append(shown(path))
        document = read_document(path, shown(path))
        return self._merged(document.root, document.problems, path)

    def document(self, data: bytes, file: str, path: Path) -> MapNode | None:
        document = parse_document(data, file)
        return self._merged(document.root, document.problems, path)

    def _merged(self, root: MapNode | None, problems: list[Problem], path: Path) -> MapNode | None:
        if path not in self._complained:
            self.problems += problems
            self._complained.add(path)
        if root is None:
            self.is_partial = True
            return None
        entries = dict(root.entries)
        extends = entries.pop("extends", None)
        base: Node | None = None
        self._open.append(path.resolve())
        for name in self._extended(extends):
            parent = self._parent(name, path)
            if parent is not None:
                base = lay_over(base, parent, self.shape, (), self.problems)
        self._open.pop()
        whole = lay_over(base, MapNode(entries, root.place), self.shape, (), self.problems)
        assert isinstance(whole, MapNode)
        return whole

    def _extended(self, entry: Entry | None) -> list[Scalar]:
        if entry is None:
            return []
        nodes = entry.node.items if isinstance(entry.node, ListNode) else (entry.node,)
        names = [node for node in nodes if isinstance(node, Scalar) and isinstance(node.value, str)]
        if len(names) < len(nodes) and not (isinstance(entry.node, Scalar) and entry.node.value is None):
            self._complain(entry.node.place, "expected a name, a path, or a list of them")
        return names

    def _parent(self, name: Scalar, child: Path) -> MapNode | None:
        """The tree of one extended spec: a path relative to the file that names it, or else a name."""
        try:
            path = beside(child, str(name.value)) or find(str(name.value), self.kind)
        except NotFound as error:
            self._complain(name.place, str(error))
            return None
        if path.resolve() in self._open:
            circle = self._open[self._open.index(path.resolve()) :]
            names = " -> ".join(shown(link) for link in (*circle, path))
            self._complain(name.place, f"goes round in a circle: {names}")
            return None
        return self.file(path)

    def _complain(self, place: Place, message: str) -> None:
        self.is_partial = True
        self.problems.append(Problem.at(place, "extends", message))


def shown(path: Path) -> str:
    """How messages name a file: relative to the current folder if it lies below it."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    if path.is_absolute() and (here == Path(here.anchor) or not absolute.is_relative_to(here)):
        return str(absolute)
    return os.path.relpath(absolute, here)


def beside(child: Path, name: str) -> Path | None:
    """The file that a name means relative to the file that extends it."""
    path = child.parent / Path(name).expanduser()
    candidates = (
        [path] if path.suffix in SUFFIXES else [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    )
    return next((candidate for candidate in candidates if candidate.is_file()), None)
