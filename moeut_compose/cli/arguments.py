"""Arguments that several commands share: specs by name or path, and `key=value` changes among them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from moeut_compose.cli.failures import wrong_usage
from moeut_compose.spec.find import KINDS, Kind, NotFound, find, not_found
from moeut_compose.spec.io import is_override, kind_of, split_overrides

SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="A name that `ls` shows, a YAML file, or a run folder.")
]
SpecsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC", help="Names, YAML files or run folders; also `key=value` changes to all of them."
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value", help="Changes, such as `stages.0.repeats=4` or `recipe.optimizer.lr=1e-3`."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def specs_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell specs from changes: only a change has a `=` after a dotted key."""
    specs = [argument for argument in arguments if not is_override(argument)]
    if not specs:
        raise wrong_usage("no SPEC is named, only changes")
    return specs, [argument for argument in arguments if is_override(argument)]


def architecture_overrides(overrides: Sequence[str]) -> list[str]:
    """The changes, none of which may be meant for a recipe."""
    architecture, recipe = split_overrides(check_overrides(overrides))
    if recipe:
        raise wrong_usage(f"{recipe[0]}: no recipe is used here")
    return architecture


def check_overrides(overrides: Sequence[str] | None) -> list[str]:
    for override in overrides or ():
        if not is_override(override):
            raise wrong_usage(f"{override!r} is not a change; write key=value, such as stages.0.repeats=4")
    return list(overrides or ())


def find_any(name: str) -> tuple[Path, Kind]:
    """A spec of either kind. Raises `NotFound`."""
    for kind in KINDS:
        with suppress(NotFound):
            path = find(name, kind)
            return path, kind_of(path)
    raise NotFound(not_found(name, *KINDS))
