"""From a sweep file to its runs: every architecture and recipe loaded, every mistake at its place in the file."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moeut_compose.spec.explain import explain
from moeut_compose.spec.find import Kind, NotFound, find
from moeut_compose.spec.inherit import beside, shown
from moeut_compose.spec.io import (
    RECIPE_PREFIX,
    Change,
    key_paths,
    load_as,
    split_overrides,
    version_problems,
)
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.nodes import Entry, ListNode, MapNode, Scalar, is_null, plain
from moeut_compose.spec.problems import Problem, SpecError
from moeut_compose.spec.recipe import RecipeSpec
from moeut_compose.spec.shapes import Shape
from moeut_compose.spec.sweep import SweepSpec
from moeut_compose.spec.yaml import read_document

MAX_RUNS = 1000
"""A sweep of more is a mistake."""
_LONGEST_NAME = 120


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep. Its name follows from what it is, so it stays when others are added."""

    name: str
    architecture: ModelSpec
    recipe: RecipeSpec
    changes: dict[str, Any]
    """What sets this run apart: architecture, recipe, and the keys of `grid` and `variants`."""

    @property
    def context(self) -> int:
        """Tokens of a training window."""
        return self.recipe.context or self.architecture.context_length

    @property
    def steps(self) -> int:
        return self.recipe.num_steps(self.context)

    @property
    def tokens(self) -> int:
        return self.steps * self.recipe.batch.size * self.context


@dataclass(frozen=True)
class Sweep:
    """A sweep with its runs, in order."""

    spec: SweepSpec
    runs: tuple[PlannedRun, ...]


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file, and everything that its runs are made of.

    Raises `NotFound` if there is no such file, `SpecError` with the problems of the file and of all its runs.
    """
    if not path.is_file():
        raise NotFound(f"{path} is not a file; a sweep is a YAML file that names architectures and changes")
    document = read_document(path, shown(path))
    if document.root is None:
        raise SpecError(document.problems)
    problems = [*document.problems, *version_problems(document.root)]
    try:
        spec = SweepSpec.model_validate_json(json.dumps(plain(_without_nulls(document.root))))
    except ValidationError as error:
        found = explain(error, document.root, Shape.of(SweepSpec), _misplaced())
        problems += [problem for problem in found if problem.path != "version"]
    if problems:
        raise SpecError(sorted(problems, key=lambda problem: (problem.line, problem.column)))
    return Sweep(spec, tuple(_Expansion(path, document.root).runs()))


def _without_nulls(root: MapNode) -> MapNode:
    """`key:` with nothing behind it takes the default."""
    entries = {key: entry for key, entry in root.entries.items() if not is_null(entry.node)}
    return MapNode(entries, root.place)


def _misplaced() -> dict[str, str]:
    """Keys of architectures and recipes, which belong one level deeper here."""
    where = "belongs below changes, grid or variants, as"
    recipe = {key: f"{where} {RECIPE_PREFIX}{path}" for key, path in key_paths(Shape.of(RecipeSpec)).items()}
    architecture = {key: f"{where} {path}" for key, path in key_paths(Shape.of(ModelSpec)).items()}
    return {key: text for key, text in (recipe | architecture).items() if key not in SweepSpec.model_fields}


class _Expansion:
    """The runs of one file. Values keep their places, so that a run's problems point into the sweep."""

    def __init__(self, path: Path, root: MapNode) -> None:
        self._path = path
        self._root = root
        self._problems: list[Problem] = []
        self._specs: dict[tuple[Any, ...], Any] = {}

    def runs(self) -> list[PlannedRun]:
        """All of them, in order. Raises `SpecError` with the problems of all."""
        architectures = self._files("architectures", "architectures")
        recipes = self._files("recipes", "recipes")
        n_runs = len(architectures) * max(1, len(recipes)) * math.prod(len(axis) for axis in self._axes())
        if n_runs > MAX_RUNS:
            reason = f"the sweep holds {n_runs:,} runs; more than {MAX_RUNS:,} are refused"
            raise SpecError([*self._problems, Problem.at(self._root.place, "", reason)])
        shared = self._changes(self._node("changes"))
        found = [
            self._run(architecture, recipe, shared, [change for part in choice for change in part])
            for architecture in architectures
            for recipe in recipes or [Scalar("default", "default", self._root.place)]
            for choice in itertools.product(*self._axes())
        ]
        runs = [run for run in found if run is not None]
        for name, count in Counter(run.name for run in runs).items():
            if count > 1:
                self._problems.append(Problem.at(self._root.place, "", f"{count} runs are the same: {name}"))
        if self._problems:
            here = shown(self._path)
            raise SpecError(sorted(self._problems, key=lambda p: (p.file != here, p.file, p.line, p.column)))
        return runs

    def _node(self, key: str) -> MapNode | ListNode | Scalar | None:
        entry = self._root.entries.get(key)
        return None if entry is None or is_null(entry.node) else entry.node

    def _files(self, key: str, kind: Kind) -> list[Scalar]:
        """The entries of a list of specs; those that are not found are complained of and left out."""
        node = self._node(key)
        names = (
            [item for item in node.items if isinstance(item, Scalar)] if isinstance(node, ListNode) else []
        )
        found = []
        for index, name in enumerate(names):
            try:
                self._find(name, kind)
                found.append(name)
            except NotFound as error:
                self._problems.append(Problem.at(name.place, f"{key}.{index}", str(error)))
        return found

    def _find(self, name: Scalar, kind: Kind) -> Path:
        return beside(self._path, str(name.value)) or find(str(name.value), kind)

    @staticmethod
    def _changes(node: object) -> list[Change]:
        return (
            [Change(key, entry) for key, entry in node.entries.items()] if isinstance(node, MapNode) else []
        )

    def _axes(self) -> Iterator[list[list[Change]]]:
        """The variants, then each key of the grid: lists of changes that are made together."""
        variants = self._node("variants")
        if isinstance(variants, ListNode):
            yield [self._changes(item) for item in variants.items]
        for key, place, values in self._grid():
            yield [[Change(key, Entry(place, value))] for value in values.items]

    def _grid(self) -> Iterator[tuple[str, Any, ListNode]]:
        grid = self._node("grid")
        for key, entry in grid.entries.items() if isinstance(grid, MapNode) else ():
            assert isinstance(entry.node, ListNode)
            yield key, entry.key_place, entry.node

    def _run(
        self, architecture: Scalar, recipe: Scalar, shared: list[Change], own: list[Change]
    ) -> PlannedRun | None:
        of_architecture, of_recipe = split_overrides([*shared, *own])
        spec = self._load(ModelSpec, architecture, "architectures", of_architecture)
        how = self._load(RecipeSpec, recipe, "recipes", of_recipe)
        if spec is None or how is None:
            return None
        changes = {change.key: plain(change.entry.node) for change in own}
        recipes = self._node("recipes")
        has_choice = isinstance(recipes, ListNode) and len(recipes.items) > 1
        parts = [_stem(architecture), *([_stem(recipe)] if has_choice else []), *_labels(changes)]
        named = {"architecture": str(architecture.value), "recipe": str(recipe.value)}
        return PlannedRun(_shortened("-".join(parts)), spec, how, named | changes)

    def _load(self, model: Any, name: Scalar, kind: Kind, changes: list[Change]) -> Any:
        """The spec with its changes, loaded once for all runs that share it; None, and complaints, if it is wrong."""
        key = (kind, name.value, *((change.key, id(change.entry.node)) for change in changes))
        if key not in self._specs:
            try:
                self._specs[key] = load_as(model, kind, self._find(name, kind), changes)
            except SpecError as error:
                self._problems += error.problems
                self._specs[key] = None
        return self._specs[key]


def _stem(name: Scalar) -> str:
    return _safe(Path(str(name.value)).stem)


def _labels(changes: dict[str, Any]) -> list[str]:
    """`d_model_64` and the like, sorted; the last part of a key where no other ends so."""
    endings = Counter(key.rpartition(".")[2] for key in changes)
    labels = []
    for key, value in changes.items():
        last = key.rpartition(".")[2]
        labels.append(f"{_safe(last if endings[last] == 1 else key)}_{_label(value)}")
    return sorted(labels)


def _label(value: Any) -> str:
    if not isinstance(value, dict | list):
        return _safe(str(value))
    kind = value.get("kind", "map") if isinstance(value, dict) else "list"
    return f"{_safe(str(kind))}_{_digest(json.dumps(value, sort_keys=True))}"


def _safe(text: str) -> str:
    """The text as a part of a folder's name; what had to be changed is told apart by a digest."""
    clean = re.sub(r"[^\w.+-]", "_", text).strip(".") or "_"
    return clean if clean == text else f"{clean}_{_digest(text)}"


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}-{_digest(name, 8)}"


def _digest(text: str, length: int = 6) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]
