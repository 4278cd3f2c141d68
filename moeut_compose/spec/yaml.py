"""YAML as people write it, with the place of every key and value.

PyYAML composes the nodes; what a plain word means is decided here, by the core schema of YAML 1.2 with two kindnesses:
`1e-3` is a number without needing a dot, and digits may be grouped as in `100_000`. Only `true` and `false` are
booleans. YAML 1.1 would also turn yes, no, on and off into booleans, so that `norm: no` became `norm: false`; here they
stay words, and where a boolean is expected the message says what to write.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from moeut_compose.spec.nodes import Entry, ListNode, MapNode, Node, Scalar, dotted
from moeut_compose.spec.problems import Place, Problem

MAX_BYTES = 4 * 2**20
MAX_NODES = 200_000
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_MEANINGS = ("plain", "str", "int", "float", "bool", "null", "map", "seq")
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INT = re.compile(rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True, slots=True)
class Document:
    """What one file holds. `root` is None when it cannot be used at all."""

    root: MapNode | None
    problems: list[Problem]


def read_document(path: Path, file: str) -> Document:
    """Read a YAML file whose top level is a map; `file` is what messages call it."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return _refused(Place(file), f"cannot be read: {(error.strerror or str(error)).lower()}")
    return parse_document(data, file)


def parse_document(data: bytes, file: str) -> Document:
    """The bytes of a YAML file as a tree. Every duplicate key is found; broken YAML ends at the first problem."""
    if len(data) > MAX_BYTES:
        return _refused(Place(file), f"larger than {MAX_BYTES // 2**20} MiB, which no spec is")
    if b"\0" in data:
        return _refused(Place(file), "a binary file, not YAML")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        place = Place(file, before.count(b"\n") + 1, column)
        return _refused(place, f"byte 0x{data[error.start]:02x} is not UTF-8 text; save the file as UTF-8")
    if text.startswith("#!"):
        return _refused(Place(file, 1, 1), "a script, not a YAML spec")
    try:
        nodes = _compose(text)
    except yaml.MarkedYAMLError as error:
        return _refused(_mark(error, file), _broken(error))
    except ReaderError as error:
        before_text = text[: error.position]
        line, column = before_text.count("\n") + 1, error.position - before_text.rfind("\n")
        return _refused(
            Place(file, line, column), f"character #x{ord(text[error.position]):04x} is not allowed in YAML"
        )
    except RecursionError:
        return _refused(Place(file), "nested too deeply for a spec")
    if not nodes or (len(nodes) == 1 and _is_empty(nodes[0])):
        return _refused(Place(file), "is empty; a spec is a map of keys to values")
    if len(nodes) > 1:
        return _refused(_place(nodes[1], file), "a second document begins here; a spec file holds one")
    reader = _TreeReader(file)
    root = reader.node(nodes[0])
    if isinstance(root, MapNode):
        return Document(root, reader.problems)
    found = "a list" if isinstance(root, ListNode) else "text"
    return _refused(root.place, f"holds {found}; a spec is a map of keys to values, such as `d_model: 128`")


def parse_value(text: str, place: Place) -> tuple[Node, list[Problem]]:
    """A value as it is written after the `=` of an override."""
    try:
        nodes = _compose(text)
    except (yaml.MarkedYAMLError, ReaderError, RecursionError) as error:
        reason = _broken(error) if isinstance(error, yaml.MarkedYAMLError) else "not a YAML value"
        return Scalar(None, text, place), [Problem.at(place, "", reason)]
    if not nodes:
        return Scalar(None, text, place), []
    if len(nodes) > 1:
        return Scalar(None, text, place), [Problem.at(place, "", "holds two YAML documents")]
    reader = _TreeReader(place.file, place)
    return reader.node(nodes[0]), reader.problems


def resolve(text: str) -> str | int | float | bool | None:
    """What a plain, unquoted word means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Resolver(BaseResolver):
    """Gives every plain scalar the same tag; `resolve` reads it."""

    def resolve(self, kind: type, value: str, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode:
            return f"{_TAG}plain" if implicit[0] else f"{_TAG}str"
        return f"{_TAG}seq" if kind is yaml.SequenceNode else f"{_TAG}map"


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    def __init__(self, stream: str) -> None:
        Reader.__init__(self, stream)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)


def _compose(text: str) -> list[yaml.Node]:
    """The documents of a text. Raises PyYAML's errors, and `RecursionError` for text that nests without end."""
    loader = _Loader(text)
    nodes: list[yaml.Node] = []
    while loader.check_node():
        node = loader.get_node()
        if node is not None:
            nodes.append(node)
    return nodes


class _TreeReader:
    """Turns PyYAML's nodes into ours: merge keys, aliases, tags and duplicate keys are dealt with here."""

    def __init__(self, file: str, place: Place | None = None) -> None:
        self.problems: list[Problem] = []
        self._file = file
        self._fixed_place = place
        self._open: list[yaml.Node] = []
        self._path: list[str | int] = []
        self._n_nodes = 0

    def node(self, node: yaml.Node) -> Node:
        place = self._place(node)
        self._n_nodes += 1
        if reason := self._excess(node):
            self._complain(place, reason)
            return Scalar(None, "", place)
        self._open.append(node)
        try:
            return self._read(node, place)
        finally:
            self._open.pop()

    def _excess(self, node: yaml.Node) -> str:
        if node in self._open:
            return "an alias that contains itself"
        if len(self._open) > MAX_DEPTH:
            return "nested too deeply for a spec"
        return "aliases unfold to more than a spec holds" if self._n_nodes > MAX_NODES else ""

    def _read(self, node: yaml.Node, place: Place) -> Node:
        if node.tag.removeprefix(_TAG) not in _MEANINGS:
            self._complain(place, f"tag {node.tag} has no meaning in a spec")
        match node:
            case yaml.MappingNode():
                return self._map(node, place)
            case yaml.SequenceNode():
                return ListNode(tuple(self._at(i, item) for i, item in enumerate(node.value)), place)
            case yaml.ScalarNode():
                return self._scalar(node, place)
        raise AssertionError(f"{type(node).__name__} is no YAML node")

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Scalar:
        tag = node.tag.removeprefix(_TAG)
        value = node.value if tag == "str" else resolve(node.value)
        if tag == "float" and isinstance(value, int):
            value = float(value)
        expected = {"int": int, "float": float, "bool": bool, "null": type(None)}.get(tag)
        if expected is not None and type(value) is not expected:
            self._complain(place, f"{node.value!r} cannot be read as !!{tag}")
        return Scalar(value, node.value, place)

    def _map(self, node: yaml.MappingNode, place: Place) -> MapNode:
        entries: dict[str, Entry] = {}
        inherited: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            key_place = self._place(key_node)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            value = self._at(key, value_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(key_place, "a key must be a plain word")
            elif key == "<<" and key_node.tag == f"{_TAG}plain":
                self._inherit(inherited, value, key_place)
            elif key in entries:
                first = entries[key].key_place.line
                self._complain(
                    key_place, f"duplicate key{f'; it is on line {first} already' if first else ''}", key
                )
            else:
                entries[key] = Entry(key_place, value)
        return MapNode({**inherited, **entries}, place)

    def _inherit(self, inherited: dict[str, Entry], value: Node, place: Place) -> None:
        """`<<: *anchor` or `<<: [*first, *second]`, where the first wins."""
        for source in value.items if isinstance(value, ListNode) else (value,):
            if isinstance(source, MapNode):
                for key, entry in source.entries.items():
                    inherited.setdefault(key, entry)
            else:
                self._complain(place, "<< takes an alias of a map")

    def _place(self, node: yaml.Node) -> Place:
        return self._fixed_place or _place(node, self._file)

    def _at(self, key: str | int, node: yaml.Node) -> Node:
        self._path.append(key)
        try:
            return self.node(node)
        finally:
            self._path.pop()

    def _complain(self, place: Place, message: str, *below: str) -> None:
        self.problems.append(Problem.at(place, dotted((*self._path, *below)), message))


def _place(node: yaml.Node, file: str) -> Place:
    return Place(file, node.start_mark.line + 1, node.start_mark.column + 1)


def _mark(error: yaml.MarkedYAMLError, file: str) -> Place:
    mark = error.problem_mark or error.context_mark
    return Place(file, mark.line + 1, mark.column + 1) if mark is not None else Place(file)


def _broken(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem:
        return "broken YAML: a tab; indent with spaces"
    if problem.startswith("found undefined alias"):
        return f"broken YAML: {problem.replace('found undefined alias', 'no anchor is named')}"
    context = f"{error.context}, " if error.context else ""
    return f"broken YAML: {context}{problem}"


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.tag == f"{_TAG}plain"


def _refused(place: Place, message: str) -> Document:
    return Document(None, [Problem.at(place, "", message)])
