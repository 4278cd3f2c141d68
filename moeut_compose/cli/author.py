"""`new`, `validate` and `schema`: writing specs and checking them."""

import os
import re
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from moeut_compose.cli.arguments import (
    JsonOption,
    SpecsArgument,
    check_overrides,
    find_any,
    specs_and_overrides,
)
from moeut_compose.cli.failures import FAILED, USAGE, complain, wrong_usage
from moeut_compose.cli.output import as_json_text, print_json
from moeut_compose.spec.find import Kind, NotFound, find, name_of, reference, singular
from moeut_compose.spec.inherit import shown
from moeut_compose.spec.io import load_as, load_spec, model_of, split_overrides
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.problems import Problem, SpecError
from moeut_compose.spec.schema import json_schema, plain_schema

DEFAULT_BASE = "moeut_tiny"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")


class SchemaKind(StrEnum):
    """What a schema describes."""

    architecture = "architecture"
    recipe = "recipe"
    sweep = "sweep"


def schema(
    kind: Annotated[SchemaKind, typer.Argument(help="Of which files.")] = SchemaKind.architecture,
) -> None:
    """Print the JSON Schema of architecture, recipe or sweep files, for editors.

    **Example**

    - `moeut-compose schema architecture > schemas/architecture.json`
    """
    if kind is SchemaKind.sweep:
        from moeut_compose.spec.sweep import SweepSpec

        print_json(plain_schema(SweepSpec))
        return
    folder: Kind = "architectures" if kind is SchemaKind.architecture else "recipes"
    print_json(json_schema(model_of(folder), folder))


def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the new architecture, such as `wide_moeut`.")
    ],
    base: Annotated[
        str, typer.Option("--from", metavar="SPEC", help="The architecture that it changes.")
    ] = DEFAULT_BASE,
) -> None:
    """Write `architectures/NAME.yaml` in the current folder: a variant of another architecture, ready to edit.

    **Example**

    - `moeut-compose new ablations/no_rope --from moeut_44m`
    """
    stem = name.removeprefix("architectures/").removesuffix(".yaml")
    if not _NAME.fullmatch(stem) or ".." in stem:
        raise wrong_usage(f"{name!r} is not a name: use letters, digits, _ and -, and / for a subfolder")
    path = Path("architectures", f"{stem}.yaml")
    if path.exists():
        raise wrong_usage(f"{path} exists already")
    if name_of(find(base, "architectures"), "architectures") == stem:
        raise wrong_usage(f"{stem} would extend itself; give the variant a name of its own")
    spec = load_spec(base)
    schema_file = Path("schemas", "architecture.json")
    text = _TEMPLATE.format(
        schema=os.path.relpath(schema_file, path.parent),
        base=reference(base, "architectures", path.parent),
        name=yaml.safe_dump(stem.rpartition("/")[2]).splitlines()[0],
        base_title=spec.name,
        repeats=spec.stages[0].repeats,
        d_model=spec.d_model,
    )
    _write_new(path, text)
    if not schema_file.exists():
        _write_new(schema_file, as_json_text(json_schema(ModelSpec, "architectures")) + "\n")
    load_spec(path)
    print(path)


def _write_new(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


_TEMPLATE = """\
# yaml-language-server: $schema={schema}
version: 1
extends: {base}
name: {name}
description: A variant of {base_title}
# What differs from {base_title} goes here. Maps merge, lists and single values replace, null takes away,
# and a dotted key reaches into lists:
# d_model: {d_model}
# stages.0.repeats: {repeats}
"""


def validate(specs: SpecsArgument, as_json: JsonOption = False) -> None:
    """Check architectures and recipes, and print every problem of every file.

    **Examples**

    - `moeut-compose validate architectures/*.yaml`
    - `moeut-compose validate moeut_tiny stages.0.repeats=0`
    """
    names, overrides = specs_and_overrides(specs)
    check_overrides(overrides)
    reports = [_check(name, overrides) for name in names]
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            report.print()
    if not all(report.ok for report in reports):
        raise typer.Exit(FAILED if any(report.path and not report.ok for report in reports) else USAGE)


@dataclass
class _Report:
    """What is wrong with one spec; `path` is empty if there is none of that name."""

    spec: str
    kind: str = ""
    path: str = ""
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def print(self) -> None:
        if self.ok:
            print(f"{self.path}: ok")
        for problem in self.problems:
            complain(str(problem) if self.path else f"error: {problem.message}")

    def to_dict(self) -> dict[str, Any]:
        problems = [asdict(problem) for problem in self.problems]
        return {"spec": self.spec, "kind": self.kind, "path": self.path, "ok": self.ok, "problems": problems}


def _check(name: str, overrides: list[str]) -> _Report:
    report = _Report(name)
    try:
        path, kind = find_any(name)
        report.kind, report.path = singular(kind), shown(path)
        architecture, recipe = split_overrides(overrides)
        load_as(model_of(kind), kind, path, recipe if kind == "recipes" else architecture)
    except NotFound as error:
        report.problems = [Problem(name, 0, 0, "", str(error))]
    except SpecError as error:
        report.problems = error.problems
    return report
