"""`new`, `validate` and `schema`: writing specs and checking them."""

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moeut_compose.cli.arguments import JsonOption, SpecsArgument, check_overrides, find_any, specs_and_overrides
from moeut_compose.cli.failures import FAILED, USAGE, complain, wrong_usage
from moeut_compose.cli.output import print_json
from moeut_compose.spec.find import Kind, NotFound, find
from moeut_compose.spec.io import load_as, load_spec, model_of, shown, split_overrides
from moeut_compose.spec.problems import Problem, SpecError
from moeut_compose.spec.schema import json_schema

DEFAULT_BASE = "moeut_tiny"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")


class SchemaKind(StrEnum):
    """What a schema describes."""

    architecture = "architecture"
    recipe = "recipe"


def schema(kind: Annotated[SchemaKind, typer.Argument(help="Of which files.")] = SchemaKind.architecture) -> None:
    """Print the JSON Schema of architecture or recipe files, for editors.

    **Example:** `moeut-compose schema architecture > schemas/architecture.json`
    """
    folder: Kind = "architectures" if kind is SchemaKind.architecture else "recipes"
    print_json(json_schema(model_of(folder), folder))


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new architecture, such as `wide_moeut`.")],
    base: Annotated[str, typer.Option("--from", metavar="SPEC", help="The architecture that it changes.")] = DEFAULT_BASE,
) -> None:
    """Write `architectures/NAME.yaml` in the current folder: a variant of another architecture, ready to edit.

    **Example:** `moeut-compose new ablations/no_rope --from moeut_44m`
    """
    stem = name.removeprefix("architectures/").removesuffix(".yaml")
    if not _NAME.fullmatch(stem) or ".." in stem:
        raise wrong_usage(f"{name!r} is not a name: use letters, digits, _ and -, and / for a subfolder")
    path = Path("architectures", f"{stem}.yaml")
    spec = load_spec(base)
    source = find(base, "architectures")
    if path.exists():
        raise wrong_usage(f"{path} exists already")
    folder = Path("schemas")
    base_name = os.path.relpath(source, path.parent) if Path(base).is_file() else base
    text = _TEMPLATE.format(
        schema=os.path.relpath(folder / "architecture.json", path.parent),
        base=base_name,
        name=stem.rpartition("/")[2],
        base_title=spec.name,
        repeats=spec.stages[0].repeats,
        d_model=spec.d_model,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    schema_file = folder / "architecture.json"
    if not schema_file.exists():
        import json

        folder.mkdir(exist_ok=True)
        document = json_schema(model_of("architectures"), "architectures")
        schema_file.write_text(f"{json.dumps(document, indent=2, ensure_ascii=False)}\n", encoding="utf-8")
    load_spec(path)
    print(path)


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

    **Examples:** `moeut-compose validate architectures/*.yaml`, `moeut-compose validate moeut_tiny stages.0.repeats=0`
    """
    names, overrides = specs_and_overrides(specs)
    check_overrides(overrides)
    reports = [_check(name, overrides) for name in names]
    if as_json:
        print_json(reports)
    for report in reports if not as_json else ():
        if report["ok"]:
            print(f"{report['path']}: ok")
        for line in report["lines"]:
            complain(line)
    for report in reports:
        del report["lines"]
    if not all(report["ok"] for report in reports):
        raise typer.Exit(FAILED if any(report["path"] and not report["ok"] for report in reports) else USAGE)


def _check(name: str, overrides: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = {"spec": name, "kind": None, "path": None, "ok": False, "problems": [], "lines": []}
    try:
        path, kind = find_any(name)
        report |= {"kind": kind.removesuffix("s"), "path": shown(path)}
        architecture, recipe = split_overrides(overrides)
        load_as(model_of(kind), kind, path, recipe if kind == "recipes" else architecture)
    except NotFound as error:
        report |= {"problems": [_as_data(Problem(name, 0, 0, "", str(error)))], "lines": [f"error: {error}"]}
    except SpecError as error:
        report |= {"problems": [_as_data(p) for p in error.problems], "lines": [str(p) for p in error.problems]}
    else:
        report["ok"] = True
    return report


def _as_data(problem: Problem) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(problem)
