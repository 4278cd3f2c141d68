"""JSON Schema for editors: the language as people write it, with `extends`, dotted keys and `null`.

It is a little more lenient than the loader, which alone sees what a file inherits: with `extends` nothing is required
at the top, and a map may leave out its `kind`.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from moeut_compose.spec.base import Spec
from moeut_compose.spec.find import Kind
from moeut_compose.spec.shapes import Shape

DOTTED_KEY = r"^[A-Za-z_]\w*(\.\w+)+$"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def plain_schema(model: type[Spec]) -> dict[str, Any]:
    """The schema of files that hold a `model` as it is, without `extends` or dotted keys."""
    schema = model.model_json_schema(mode="validation")
    _describe(model, schema, schema.get("$defs", {}))
    return {"$schema": DIALECT, **schema}


def _describe(model: type[Spec], schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Add what the strings below the fields say."""
    for found in models_below(Shape.of(model)):
        definition = schema if found is model else definitions[found.__name__]
        for field, text in field_docs(found).items():
            definition["properties"][field]["description"] = text


def json_schema(model: type[Spec], kind: Kind) -> dict[str, Any]:
    """The schema of files that hold a `model`."""
    schema = model.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    for definition in (schema, *definitions.values()):
        if "properties" in definition:
            definition["patternProperties"] = {DOTTED_KEY: {"description": "Reaches into maps and lists."}}
    _describe(model, schema, definitions)
    for name in _union_members([schema, definitions]):
        definitions[name]["required"] = list(dict.fromkeys(["kind", *definitions[name].get("required", [])]))
    required = schema.pop("required", [])
    schema["properties"] = {
        "extends": {
            "description": f"The {kind} that this one changes: names, or paths relative to this file.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        **{key: _or_partial(value, definitions) for key, value in schema["properties"].items()},
    }
    return {
        "$schema": DIALECT,
        **schema,
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": required},
        "$defs": definitions,
    }


def models_below(shape: Shape) -> list[type[BaseModel]]:
    """Every map that may stand at a place or below it."""
    found: dict[type[BaseModel], None] = {}
    for model in shape.models:
        found[model] = None
        for field in model.model_fields.values():
            found.update(dict.fromkeys(models_below(Shape.of(field.annotation))))
    return list(found)


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """What the strings below the fields of a model say, on one line each."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _docs_of_module(base.__module__).get(base.__name__, {})
    return found


@cache
def _docs_of_module(module: str) -> dict[str, dict[str, str]]:
    """The strings below annotated names, for each class of a module."""
    source = inspect.getsource(importlib.import_module(module))
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_docs_of_fields(node)) for node in classes}


def _docs_of_fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(node.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def _union_members(node: Any) -> set[str]:
    """The definitions that are told apart by `kind`, which they must therefore hold."""
    found: set[str] = set()
    match node:
        case {"discriminator": {"mapping": dict(mapping)}, **others}:
            found = {reference.rpartition("/")[2] for reference in mapping.values()} | _union_members(others)
        case dict():
            found = found.union(*(_union_members(item) for item in node.values()))
        case list():
            found = found.union(*(_union_members(item) for item in node))
    return found


def _or_partial(property_schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A top-level value, or null, or the part of a map that changes an inherited one."""
    alternatives = property_schema.get("anyOf") or property_schema.get("oneOf") or [property_schema]
    names = [a["$ref"].rpartition("/")[2] for a in alternatives if "$ref" in a]
    keys: dict[str, Any] = {}
    for name in names:
        for key, value in definitions[name].get("properties", {}).items():
            keys.setdefault(key, []).append(value)
    about = {
        key: value for key, value in property_schema.items() if key in ("default", "description", "title")
    }
    value = {key: value for key, value in property_schema.items() if key not in about}
    choices = [value, {"type": "null"}]
    if keys:
        choices.insert(1, _partial(keys))
    return {**about, "anyOf": choices}


def _partial(keys: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        "type": "object",
        "not": {"required": ["kind"]},
        "properties": {
            key: values[0] if len(values) == 1 else {"anyOf": values} for key, values in keys.items()
        },
        "patternProperties": {DOTTED_KEY: {}},
        "additionalProperties": False,
    }
