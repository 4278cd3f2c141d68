"""From YAML to a spec and back: `extends`, dotted keys, overrides, and every problem at its place.

A spec is read in four steps: its file and those it extends become one tree, the overrides are laid over it, Pydantic
validates the plain data, and what Pydantic complains of is found again in the tree.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pydantic import ValidationError

from moeut_compose.spec.base import Spec
from moeut_compose.spec.dump import dump_yaml
from moeut_compose.spec.explain import explain
from moeut_compose.spec.find import Kind, NotFound, find, with_article
from moeut_compose.spec.inherit import Reader
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.nodes import (
    Entry,
    MapNode,
    Node,
    Reach,
    Scalar,
    joined,
    lay_over,
    plain,
    reach,
    without_nulls,
)
from moeut_compose.spec.problems import COMMAND_LINE, Place, Problem, SpecError
from moeut_compose.spec.shapes import Shape
from moeut_compose.spec.yaml import parse_value, read_document

if TYPE_CHECKING:
    from moeut_compose.spec.recipe import RecipeSpec

__all__ = [
    "NotFound",
    "Problem",
    "SpecError",
    "dump_yaml",
    "load_recipe",
    "load_spec",
    "parse_spec",
    "split_overrides",
]

AnySpec = TypeVar("AnySpec", bound=Spec)


class Change(NamedTuple):
    """An override that is written in a file, where its problems are to be shown."""

    key: str
    entry: Entry


AnyOverride = TypeVar("AnyOverride", str, Change)

RECIPE_PREFIX = "recipe."
_OVERRIDE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)
_SHARED_KEYS = {"version", "name", "description", "kind"}


def load_spec(name_or_path: str | Path, overrides: Sequence[str] = ()) -> ModelSpec:
    """Read, override and validate an architecture: a name, a YAML file, a run or a checkpoint folder.

    An override is `dotted.key=value`, the value written as YAML. Raises `NotFound`, or `SpecError` with all problems.
    """
    return load_as(ModelSpec, "architectures", name_or_path, overrides)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> "RecipeSpec":
    """Read, override and validate a recipe: a name, a YAML file or a run folder. Raises as `load_spec` does.

    Overrides may begin with `recipe.`, as they do where an architecture's stand beside them.
    """
    from moeut_compose.spec.recipe import RecipeSpec

    return load_as(RecipeSpec, "recipes", name_or_path, overrides)


def model_of(kind: Kind) -> "type[ModelSpec] | type[RecipeSpec]":
    """What a file of this kind holds. Recipes are imported when they are first asked for: most commands read none."""
    if kind == "architectures":
        return ModelSpec
    from moeut_compose.spec.recipe import RecipeSpec

    return RecipeSpec


def load_as(
    model: type[AnySpec], kind: Kind, name_or_path: str | Path, overrides: Sequence[str | Change] = ()
) -> AnySpec:
    """What `load_spec` and `load_recipe` do, for any spec that lives among the specs of `kind`."""
    reader = Reader(kind, Shape.of(model))
    tree = reader.file(find(str(name_or_path), kind))
    return _validated(model, reader, tree, overrides)


def parse_spec(text: str, overrides: Sequence[str] = (), *, file: str = "<text>") -> ModelSpec:
    """An architecture from YAML text, such as the one stored in a checkpoint. Raises `SpecError`."""
    reader = Reader("architectures", Shape.of(ModelSpec))
    tree = reader.document(text.encode(), file, Path())
    return _validated(ModelSpec, reader, tree, overrides)


def split_overrides(overrides: Iterable[AnyOverride]) -> tuple[list[AnyOverride], list[AnyOverride]]:
    """Overrides of the architecture, and those of the recipe (`recipe.key=value`)."""
    architecture: list[AnyOverride] = []
    recipe: list[AnyOverride] = []
    for override in overrides:
        key = override if isinstance(override, str) else override.key
        (recipe if key.startswith(RECIPE_PREFIX) else architecture).append(override)
    return architecture, recipe


def is_override(argument: str) -> bool:
    return _OVERRIDE.fullmatch(argument) is not None


def kind_of(path: Path) -> Kind:
    """Whether a file holds an architecture or a recipe, judged by its keys and then by its folder."""
    root = read_document(path, str(path)).root
    keys = {key.partition(".")[0] for key in root.entries} if root is not None else set()
    own = keys - _SHARED_KEYS
    n_architecture = len(own & set(ModelSpec.model_fields))
    if own and n_architecture == len(own):
        return "architectures"
    n_recipe = len(own & set(model_of("recipes").model_fields))
    if n_recipe == n_architecture:
        return "recipes" if "recipes" in path.absolute().parts or path.stem == "recipe" else "architectures"
    return "recipes" if n_recipe > n_architecture else "architectures"


def _validated(
    model: type[AnySpec], reader: Reader, tree: MapNode | None, overrides: Sequence[str | Change]
) -> AnySpec:
    problems = reader.problems
    if tree is not None:
        whole: Node = tree
        for patch in _override_patches(overrides, reader.kind, problems):
            whole = lay_over(whole, patch, reader.shape, (), problems)
        whole = without_nulls(whole, reader.shape)
        assert isinstance(whole, MapNode)
        problems += version_problems(whole)
        try:
            spec = model.model_validate_json(json.dumps(plain(whole)))
        except ValidationError as error:
            found = explain(
                error,
                whole,
                reader.shape,
                _misplaced(reader.kind),
                is_partial=reader.is_partial,
                at_root=("extends",),
            )
            problems += [problem for problem in found if problem.path != "version"]
        else:
            if not problems:
                return spec
    files = list(dict.fromkeys([*reader.files, *(problem.file for problem in problems)]))
    raise SpecError(sorted(problems, key=lambda p: (files.index(p.file), p.line, p.column)))


def _override_patches(overrides: Sequence[str | Change], kind: Kind, problems: list[Problem]) -> list[Reach]:
    patches: list[Reach] = []
    for override in overrides:
        if isinstance(override, Change):
            key = override.key.removeprefix(RECIPE_PREFIX) if kind == "recipes" else override.key
            patches.append(reach(key, override.entry))
            continue
        place = Place(f"{COMMAND_LINE} {override}")
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            problems.append(Problem.at(place, "", "expected key=value, such as stages.0.repeats=4"))
            continue
        key, text = match.groups()
        key = key.removeprefix(RECIPE_PREFIX) if kind == "recipes" else key
        value, found = parse_value(text, place)
        problems += [Problem.at(place, f"{key}.{p.path}".rstrip("."), p.message) for p in found]
        if not found:
            patches.append(reach(key, Entry(place, value)))
    return joined(patches)


def version_problems(root: MapNode) -> list[Problem]:
    """What is wrong with the version that a file names."""
    entry = root.entries.get("version")
    if entry is None or (
        isinstance(entry.node, Scalar) and type(entry.node.value) is int and entry.node.value == 1
    ):
        return []
    written = entry.node.text if isinstance(entry.node, Scalar) else "this"
    return [
        Problem.at(
            entry.node.place, "version", f"{written} is not a version that this release reads; it reads 1"
        )
    ]


@cache
def _misplaced(kind: Kind) -> dict[str, str]:
    """Keys that only the other kind of spec has, and where they belong."""
    other: Kind = "recipes" if kind == "architectures" else "architectures"
    own = key_paths(Shape.of(model_of(kind)))
    example = (
        f"{other}/*.yaml" if other == "architectures" else f"{other}/*.yaml, or recipe.{{}}=… when training"
    )
    return {
        key: f"belongs in {with_article(other)} ({example.format(path)}), as {path}"
        for key, path in key_paths(Shape.of(model_of(other))).items()
        if key not in own and key not in _SHARED_KEYS
    }


def key_paths(shape: Shape, path: str = "") -> dict[str, str]:
    """Every key below a place, with the shortest dotted path that reaches it."""
    found: dict[str, str] = {}
    for model in shape.models:
        for key, field in model.model_fields.items():
            child = Shape.of(field.annotation)
            whole = f"{path}{key}"
            below = f"{whole}.0." if child.is_list else f"{whole}."
            for name, place in {key: whole, **key_paths(child, below)}.items():
                if name not in found or place.count(".") < found[name].count("."):
                    found[name] = place
    return found
