"""`ls` and `show`: what can be composed, and what a spec says."""

import difflib
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moeut_compose.cli.arguments import JsonOption, OverridesArgument, SpecArgument, check_overrides, find_any
from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.output import print_json, print_table
from moeut_compose.spec.base import Spec
from moeut_compose.spec.dump import dump_yaml
from moeut_compose.spec.find import KINDS, Kind, list_specs, with_article
from moeut_compose.spec.inherit import shown
from moeut_compose.spec.io import load_as, model_of
from moeut_compose.spec.model import ModelSpec
from moeut_compose.spec.nodes import Scalar
from moeut_compose.spec.problems import Place, SpecError
from moeut_compose.spec.shapes import Shape, union_members
from moeut_compose.spec.yaml import parse_value, read_document


class What(StrEnum):
    """What `ls` lists."""

    architectures = "architectures"
    recipes = "recipes"
    blocks = "blocks"


def ls(
    what: Annotated[What | None, typer.Argument(help="Only these.")] = None, as_json: JsonOption = False
) -> None:
    """List the architectures, recipes and blocks that can be composed.

    **Examples**

    - `moeut-compose ls`
    - `moeut-compose ls blocks`
    - `moeut-compose ls architectures --json`
    """
    kinds = [kind for kind in KINDS if what in (None, kind)]
    specs = {kind: [_listed(*spec) for spec in list_specs(kind)] for kind in kinds}
    blocks = _blocks() if what in (None, What.blocks) else []
    if as_json:
        print_json({**specs, **({"blocks": blocks} if blocks else {})})
        return
    for kind, listed in specs.items():
        rows = [[f"  {spec['name']}", spec["description"], _origin(spec)] for spec in listed]
        print_table([kind, "", ""], rows, n_text_columns=3)
        print()
    if blocks:
        rows = [[f"  {block['family']}", block["kind"], block["description"]] for block in blocks]
        print_table(["blocks", "", ""], rows, n_text_columns=3)


def show(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="With `extends` resolved and all defaults.")
    ] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="Stages, members, shapes and parameters as a tree.")
    ] = False,
    diff: Annotated[
        str | None, typer.Option(metavar="OTHER", help="What OTHER changes, both resolved.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a spec: as written, resolved, as a tree, or against another one.

    **Examples**

    - `moeut-compose show moeut_tiny --tree`
    - `moeut-compose show moeut_244m --diff ablations/moeut_244m_aabb`
    - `moeut-compose show moeut_tiny stages.0.repeats=4 --resolved`
    """
    path, kind = find_any(spec)
    if not (resolved or tree or diff or as_json or overrides):
        sys.stdout.write(_as_written(path))
        return
    loaded = load_as(model_of(kind), kind, path, check_overrides(overrides))
    if diff is not None:
        _show_diff(loaded, _load_other(diff, kind), as_json=as_json)
    elif as_json:
        print_json(
            {"kind": kind.removesuffix("s"), "path": shown(path), "spec": loaded.model_dump(mode="json")}
        )
    elif tree:
        if not isinstance(loaded, ModelSpec):
            raise wrong_usage(f"{spec} is a recipe; only an architecture has a tree")
        from moeut_compose.cli.tree import print_tree

        print_tree(loaded)
    else:
        sys.stdout.write(dump_yaml(loaded))


def _listed(name: str, path: Path, builtin: bool) -> dict[str, Any]:
    return {"name": name, "description": _description(path), "path": shown(path), "builtin": builtin}


def _origin(row: dict[str, Any]) -> str:
    return "" if row["builtin"] else row["path"]


def _description(path: Path) -> str:
    """The description as far as one line of the file tells; reading every file as YAML would take too long."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if found := re.search(r"^description:[ \t]*(.+)$", text, re.MULTILINE):
        node, _ = parse_value(found.group(1), Place(str(path)))
        return node.text if isinstance(node, Scalar) else found.group(1)
    extends = re.search(r"^extends:[ \t]*(.+)$", text, re.MULTILINE)
    return f"extends {extends.group(1)}" if extends else ""


def _blocks() -> list[dict[str, str]]:
    """The members of every union, architecture first."""
    return [
        {"family": family, "kind": name, "description": (model.__doc__ or "").partition("\n")[0]}
        for kind in KINDS
        for family, name, model in union_members(Shape.of(model_of(kind)))
    ]


def _load_other(name: str, kind: Kind) -> Spec:
    path, other_kind = find_any(name)
    if other_kind != kind:
        raise wrong_usage(f"{name} is not {with_article(kind)}")
    return load_as(model_of(kind), kind, path)


def _as_written(path: Path) -> str:
    """Whatever the file says. Raises `SpecError` if it is not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(read_document(path, shown(path)).problems) from None


def _show_diff(one: Spec, other: Spec, *, as_json: bool) -> None:
    if as_json:
        before, after = _leaves(one.model_dump(mode="json")), _leaves(other.model_dump(mode="json"))
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        print_json([{"path": key, "from": before.get(key), "to": after.get(key)} for key in keys])
        return
    before_lines, after_lines = (dump_yaml(spec).splitlines(keepends=True) for spec in (one, other))
    before_name, after_name = (getattr(spec, "name", "") for spec in (one, other))
    sys.stdout.writelines(difflib.unified_diff(before_lines, after_lines, before_name, after_name))


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every scalar with its dotted path."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        key: leaf for name, item in items for key, leaf in _leaves(item, f"{path}.{name}".lstrip(".")).items()
    }
