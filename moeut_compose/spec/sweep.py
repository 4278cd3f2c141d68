"""A sweep: many runs in one file, as every combination of some values or as a list.

It names architectures and recipes that exist and says what changes, in the dotted keys of the command line. Every
architecture meets every recipe, every entry of `variants` and every combination of `grid`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from moeut_compose.spec.base import Spec

Name = Annotated[str, Field(min_length=1)]
Changes = dict[str, Any]
"""Dotted key to value, as on the command line: `d_model`, `stages.0.repeats`, `recipe.optimizer.lr`."""


class SweepSpec(Spec):
    """Runs of some architectures after some recipes, with changes."""

    version: Literal[1] = 1
    name: Name
    description: str = ""
    architectures: Annotated[list[Name], Field(min_length=1)]
    """Names, or paths relative to this file."""
    recipes: Annotated[list[Name], Field(min_length=1)] = ["default"]
    """Names, or paths relative to this file."""
    changes: Changes = {}
    """Changes of every run: dotted keys, those of a recipe behind `recipe.`"""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Values of some keys; every combination is a run."""
    variants: Annotated[list[Changes], Field(min_length=1)] | None = None
    """Changes that belong together; every entry is a run, in every combination of `grid`. None: no such entries."""
