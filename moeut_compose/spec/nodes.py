"""Documents as trees that remember where every key and value is written, and how one lies over another.

`extends`, dotted keys and overrides on the command line are one operation, `lay_over`: maps merge, lists and scalars
replace, `null` takes away. Two maps of different `kind` describe different things, so there the later one replaces the
earlier instead of mixing their keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeut_compose.spec.problems import Place, Problem
from moeut_compose.spec.shapes import Shape

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value and how it was written."""

    value: str | int | float | bool | None
    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class ListNode:
    items: "tuple[Node, ...]"
    place: Place


class Entry(NamedTuple):
    """A value in a map, and where its key is written."""

    key_place: Place
    node: "Node"


@dataclass(frozen=True, slots=True)
class MapNode:
    entries: dict[str, Entry]
    place: Place

    @property
    def kind(self) -> str | None:
        """The value of the key `kind`, which says which member of a union a map describes."""
        entry = self.entries.get("kind")
        value = entry.node.value if entry is not None and isinstance(entry.node, Scalar) else None
        return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class Reach(MapNode):
    """What a dotted key stands for: a map that reaches into what is there, lists by index included."""


Node = Scalar | ListNode | MapNode


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def plain(node: Node) -> Any:
    """The tree as dicts, lists and scalars."""
    match node:
        case Scalar():
            return node.value
        case ListNode():
            return [plain(item) for item in node.items]
        case MapNode():
            return {key: plain(entry.node) for key, entry in node.entries.items()}


def planted(value: Any, place: Place) -> Node:
    """Plain data as a tree whose every node stands at `place`."""
    match value:
        case dict():
            return MapNode({key: Entry(place, planted(item, place)) for key, item in value.items()}, place)
        case list() | tuple():
            return ListNode(tuple(planted(item, place) for item in value), place)
        case _:
            return Scalar(value, str(value), place)


def is_null(node: Node | None) -> bool:
    return isinstance(node, Scalar) and node.value is None


def reach(key: str, entry: Entry) -> Reach:
    """`a.b.c` with a value, as nested maps that reach into what is there."""
    first, _, rest = key.partition(".")
    node = reach(rest, entry) if rest else entry.node
    return Reach({first: Entry(entry.key_place, node)}, entry.key_place)


def joined(patches: Iterable[Reach]) -> list[Reach]:
    """As few patches as can be, so that keys given together are judged together; the later one wins."""
    result: list[Reach] = []
    for patch in patches:
        both = _both(result[-1], patch) if result else None
        result = [*result[:-1], both] if both is not None else [*result, patch]
    return result


def _both(first: Reach, second: Reach) -> Reach | None:
    """Two patches as one; None if the second reaches into a whole value of the first."""
    entries = dict(first.entries)
    for key, entry in second.entries.items():
        old = entries.get(key)
        node: Node | None = entry.node
        if old is not None and isinstance(node, Reach):
            node = _both(old.node, node) if isinstance(old.node, Reach) else None
        if node is None:
            return None
        entries[key] = Entry(entry.key_place, node)
    return Reach(entries, first.place)


def lay_over(base: Node | None, patch: Node, shape: Shape, path: Path, problems: list[Problem]) -> Node:
    """`patch` on top of `base`. What cannot be reached is added to `problems`, and left out."""
    match patch:
        case Scalar():
            return patch
        case ListNode():
            item = shape.item()
            items = (lay_over(None, node, item, (*path, i), problems) for i, node in enumerate(patch.items))
            return ListNode(tuple(items), patch.place)
        case MapNode():
            if isinstance(patch, Reach):
                base = _reachable(base, patch, shape)
                if isinstance(base, ListNode):
                    return _lay_over_list(base, patch, shape, path, problems)
                if isinstance(base, Scalar):
                    problems.append(
                        Problem.at(patch.place, dotted(path), f"is {base.text} here, and has no keys")
                    )
                    return base
            return _lay_over_map(base if isinstance(base, MapNode) else None, patch, shape, path, problems)


def _lay_over_map(
    base: MapNode | None, patch: MapNode, shape: Shape, path: Path, problems: list[Problem]
) -> MapNode:
    if base is not None and None not in (base.kind, patch.kind) and base.kind != patch.kind:
        base = None
    entries = dict(base.entries) if base is not None else {}
    kind = patch.kind or (base.kind if base is not None else None)
    for key, entry in patch.entries.items():
        if "." not in key:
            old = entries.get(key)
            child = shape.child(key, kind)
            node = lay_over(old.node if old is not None else None, entry.node, child, (*path, key), problems)
            entries[key] = Entry(entry.key_place, node)
    whole = MapNode(entries, base.place if base is not None and isinstance(patch, Reach) else patch.place)
    for part in joined(reach(key, entry) for key, entry in patch.entries.items() if "." in key):
        whole = _lay_over_map(whole, part, shape, path, problems)
    return whole


def _lay_over_list(
    base: ListNode, patch: Reach, shape: Shape, path: Path, problems: list[Problem]
) -> ListNode:
    items: list[Node | None] = list(base.items)
    for key, entry in patch.entries.items():
        if not key.isdecimal() or int(key) >= len(items):
            reason = f"{dotted(path)} is {_size(len(items))}"
            problems.append(Problem.at(entry.key_place, dotted((*path, key)), reason))
            continue
        index = int(key)
        node = lay_over(items[index], entry.node, shape.item(), (*path, index), problems)
        items[index] = None if is_null(node) else node
    return ListNode(tuple(item for item in items if item is not None), base.place)


def _size(n_items: int) -> str:
    if n_items == 0:
        return "an empty list; give it whole"
    items = "1 item" if n_items == 1 else f"{n_items} items"
    return f"a list of {items}; reach them by number, from 0 to {n_items - 1}"


def _reachable(base: Node | None, patch: Reach, shape: Shape) -> Node | None:
    """What a dotted key reaches into: what is written, and otherwise the default, unless that is of another kind."""
    if base is not None and not is_null(base):
        return base
    default = shape.default_data()
    if isinstance(default, list) and len(default) == 1 and isinstance(default[0], dict):
        known = {**default[0], "kind": None}
        if any(key in known for key in patch.entries):
            default = default[0]  # the field takes one or many, and one is meant
    if not isinstance(default, dict | list):
        return None
    return planted(default, patch.place)


def without_nulls(node: Node, shape: Shape) -> Node:
    """Drop `null` wherever the spec has no use for it, so that the default holds there."""
    match node:
        case Scalar():
            return node
        case ListNode():
            return ListNode(tuple(without_nulls(item, shape.item()) for item in node.items), node.place)
        case MapNode():
            entries = {}
            for key, entry in node.entries.items():
                child = shape.child(key, node.kind)
                if not (is_null(entry.node) and child.is_known and not child.takes_null):
                    entries[key] = Entry(entry.key_place, without_nulls(entry.node, child))
            return MapNode(entries, node.place)
