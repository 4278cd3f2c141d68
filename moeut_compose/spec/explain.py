"""Pydantic's errors in our words, each at the place in the file that caused it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from moeut_compose.spec.find import did_you_mean, nearest
from moeut_compose.spec.nodes import ListNode, MapNode, Node, Path, Scalar, dotted
from moeut_compose.spec.problems import Place, Problem
from moeut_compose.spec.shapes import Shape

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
    "none_required": "null",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "too_short": "at least {min_length} item(s)",
    "too_long": "at most {max_length} item(s)",
    "string_too_short": "text of at least {min_length} character(s)",
    "string_too_long": "text of at most {max_length} character(s)",
    "string_pattern_mismatch": "text that matches {pattern}",
}
_BOOLEAN_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


class _Located:
    """One Pydantic error and the node that it speaks of."""

    def __init__(
        self, error: Mapping[str, Any], root: MapNode, shape: Shape, at_root: tuple[str, ...]
    ) -> None:
        self.type: str = error["type"]
        self.context: Mapping[str, Any] = error.get("ctx", {})
        self.text: str = error["msg"]
        self.path: Path = ()
        self.node: Node = root
        self.shape = shape
        self._at_root = at_root
        self.key: str | None = None
        self.key_place: Place | None = None
        loc = list(error["loc"])
        if self.type in ("missing", "extra_forbidden") and loc:
            self.key = str(loc.pop())
        for part in loc:
            self._step(part)
        if self.key is not None and isinstance(self.node, MapNode) and self.key in self.node.entries:
            self.key_place = self.node.entries[self.key].key_place

    def _step(self, part: str | int) -> None:
        """Descend by one part of Pydantic's location, which also holds the names of union members."""
        node = self.node
        if isinstance(node, MapNode):
            if isinstance(part, int) or (part in self.shape.kinds() and len(self.shape.models) > 1):
                self.shape = Shape(self.shape.models if isinstance(part, int) else self._chosen(node))
            elif part in node.entries:
                self.shape = self.shape.child(part, node.kind)
                self.node, self.path = node.entries[part].node, (*self.path, part)
        elif isinstance(node, ListNode) and isinstance(part, int) and part < len(node.items):
            self.shape = self.shape.item()
            self.node, self.path = node.items[part], (*self.path, part)

    def known_keys(self) -> list[str]:
        """The keys of the map that this error is about."""
        model = self.shape.model(self.node.kind if isinstance(self.node, MapNode) else None)
        fields = list(model.model_fields) if model is not None else []
        return fields if self.path else [*self._at_root, *fields]

    def _chosen(self, node: MapNode) -> tuple[type[BaseModel], ...]:
        model = self.shape.model(node.kind)
        return (model,) if model is not None else self.shape.models


_MAY_STAND_ELSEWHERE = ("missing", "union_tag_not_found", "value_error")


def explain(
    error: ValidationError,
    root: MapNode,
    shape: Shape,
    misplaced: Mapping[str, str],
    *,
    is_partial: bool = False,
    at_root: tuple[str, ...] = (),
) -> list[Problem]:
    """The problems behind a Pydantic error, in the order of the file.

    `misplaced` maps keys of the other kind of spec to a sentence on where they belong. A partial tree lacks a file that
    it extends, so nothing is said of what that file may hold. at_root: keys of the whole file that no field stands for.
    """
    groups: dict[tuple[Path, str | None, str], list[_Located]] = {}
    for item in error.errors(include_url=False):
        if is_partial and item["type"] in _MAY_STAND_ELSEWHERE:
            continue
        located = _Located(item, root, shape, at_root)
        whole = located.type if located.type not in _EXPECTED else "expected"
        groups.setdefault((located.path, located.key, whole), []).append(located)
    meant = {
        (*path, _near(group[0])) for (path, _, kind), group in groups.items() if kind == "extra_forbidden"
    }
    lacks_base = any((name,) in meant for name in at_root)
    problems = [
        problem
        for (path, key, kind), group in groups.items()
        if kind != "missing" or (*path, key) not in meant  # a misspelt key is not missing as well
        if not lacks_base or kind not in _MAY_STAND_ELSEWHERE
        for problem in _problems(group, misplaced)
    ]
    return sorted(problems, key=lambda problem: (problem.file, problem.line, problem.column))


def _problems(group: list[_Located], misplaced: Mapping[str, str]) -> Iterator[Problem]:
    first = group[0]
    match first.type:
        case "extra_forbidden":
            yield _unknown_key(first, misplaced)
        case "missing":
            yield Problem.at(first.node.place, dotted((*first.path, first.key or "")), "is missing")
        case "union_tag_not_found":
            kinds = ", ".join(first.shape.kinds())
            yield Problem.at(first.node.place, dotted((*first.path, "kind")), f"is missing; one of {kinds}")
        case "union_tag_invalid":
            yield _unknown_kind(first)
        case "value_error" | "assertion_error":
            for located in group:
                yield _impossible(located)
        case known if known in _EXPECTED:
            expected = " or ".join(dict.fromkeys(_expected(error) for error in group))
            message = f"expected {expected}, got {_shown(first.node)}{_hint(first)}"
            yield Problem.at(first.node.place, dotted(first.path), message)
        case _:
            yield Problem.at(first.node.place, dotted(first.path), first.text[:1].lower() + first.text[1:])


def _expected(error: _Located) -> str:
    bounds = {
        name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in error.context.items()
    }
    return _EXPECTED[error.type].format(**bounds)


def _unknown_key(error: _Located, misplaced: Mapping[str, str]) -> Problem:
    key = error.key or ""
    known = error.known_keys()
    near = _near(error)
    message = "unknown key"
    if near and (key not in misplaced or _bare(near) == _bare(key)):
        message += did_you_mean([near])
    elif key in misplaced:
        message += f"; {misplaced[key]}"
    elif known:
        message += f"; known here: {', '.join(known)}"
    return Problem.at(error.key_place or error.node.place, dotted((*error.path, key)), message)


def _near(error: _Located) -> str:
    """The key that a misspelt one means: rather one that is not there yet."""
    known = error.known_keys()
    present = error.node.entries if isinstance(error.node, MapNode) else {}
    free = [name for name in known if name not in present]
    return next(iter(nearest(error.key or "", free, n=1) or nearest(error.key or "", known, n=1)), "")


def _bare(key: str) -> str:
    return key.replace("_", "").lower()


def _unknown_kind(error: _Located) -> Problem:
    kinds = error.shape.kinds()
    node = error.node
    entry = node.entries.get("kind") if isinstance(node, MapNode) else None
    written = (
        entry.node.text
        if entry is not None and isinstance(entry.node, Scalar)
        else "written as a map or list"
    )
    near = nearest(written, kinds, n=1)
    choices = f"one of {', '.join(kinds)}"
    message = f"unknown kind {written}" + (f"{did_you_mean(near)} ({choices})" if near else f"; {choices}")
    place = entry.node.place if entry is not None else node.place
    return Problem.at(place, dotted((*error.path, "kind")), message)


def _impossible(error: _Located) -> Problem:
    """A validator's own message, at the key that it begins with if the map has it."""
    text = re.sub(r"^(Value error|Assertion failed), ", "", error.text)
    path, place = error.path, error.node.place
    field = re.match(r"[\w.]+", text)
    node: Node | None = error.node
    for part in field.group().rstrip(".").split(".") if field else ():
        if isinstance(node, MapNode) and part in node.entries:
            node = node.entries[part].node
            place = node.place
        elif isinstance(node, ListNode) and part.isdecimal() and int(part) < len(node.items):
            node = node.items[int(part)]
            place = node.place
        else:
            break
    return Problem.at(place, dotted(path), text)


def _shown(node: Node) -> str:
    match node:
        case MapNode():
            return "a map"
        case ListNode():
            return f"a list of {len(node.items)}"
        case Scalar(value=None):
            return "nothing"
        case Scalar(value=str()):
            return f"the text {node.text!r}" if len(node.text) <= 40 else f"the text {node.text[:40]!r}..."
        case Scalar():
            return node.text


def _hint(error: _Located) -> str:
    node = error.node
    if error.type in ("model_type", "model_attributes_type", "dict_type") and error.shape.kinds():
        return f"; give it a kind, one of {', '.join(error.shape.kinds())}"
    if not isinstance(node, Scalar):
        return ""
    if isinstance(node.value, str) and node.text.lower() in _BOOLEAN_WORDS and error.type.startswith("bool"):
        return f"; yes, no, on and off are plain words here: write {_BOOLEAN_WORDS[node.text.lower()]}"
    if isinstance(node.value, float) and error.type.startswith("int") and node.value.is_integer():
        return f"; write {int(node.value)}"
    if error.type == "string_type" and node.value is not None:
        return f"; quote it: '{node.text}'"
    if isinstance(node.value, str) and error.type.startswith(("int", "float")) and _is_number(node.text):
        return "; it is quoted, and so it is text: remove the quotes"
    return ""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", text.strip(), re.IGNORECASE) is not None
