"""`train`: an architecture and a recipe become a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.arguments import OverridesArgument, check_overrides
from moeut_compose.cli.devices import DeviceOption, import_torch, named_device
from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.output import print_json
from moeut_compose.spec.io import is_override, load_recipe, load_spec, split_overrides

if TYPE_CHECKING:
    import torch

    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.spec.recipe import RecipeSpec
    from moeut_compose.train.folder import Resume

DEFAULT_RECIPE = "default"


def train(
    spec: Annotated[
        str | None, typer.Argument(metavar="SPEC", help="The architecture; or a run folder, to go on.")
    ] = None,
    overrides: OverridesArgument = None,
    recipe: Annotated[str | None, typer.Option(metavar="R", help="How to train; default: `default`.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder; default: `runs/<time>-<name>`.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|none|PATH", help="Go on with the run in --out, with none, or with the run at PATH."
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print parameters, tokens, steps, memory and learning rate."),
    ] = False,
    device: DeviceOption = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="The plan or the result as one JSON document.")
    ] = False,
) -> None:
    """Train an architecture after a recipe, or go on with a run.

    Without `--recipe`: the built-in corpus and the published optimiser settings.

    **Examples**

    - `moeut-compose train moeut_tiny --recipe quickstart`
    - `moeut-compose train my.yaml d_model=256 recipe.optimizer.lr=1e-3 recipe.steps=500 --out runs/wide`
    - `moeut-compose train moeut_244m --recipe paper --dry-run`
    - `moeut-compose train --resume runs/wide`
    - `torchrun --nproc-per-node 2 -m moeut_compose train moeut_244m recipe.parallelism=fsdp`
    """
    changes = check_overrides(overrides)
    if spec is not None and is_override(spec):
        changes.insert(0, spec)
        spec = None
    architecture_changes, recipe_changes = split_overrides(changes)
    way: Resume = resume if resume in ("auto", "none") else Path(resume)  # type: ignore[assignment]
    if isinstance(way, Path) and not way.exists():
        raise wrong_usage(f"--resume {resume}: no such folder; write auto, none or a run folder")
    if spec is None and not isinstance(way, Path):
        raise wrong_usage(
            "which architecture? name a SPEC (`moeut-compose ls architectures` lists some), or --resume PATH"
        )
    if out is None and way == "auto" and spec is not None and (Path(spec) / "recipe.yaml").is_file():
        out = Path(spec)
    architecture = load_spec(spec if spec is not None else str(way), architecture_changes)
    chosen_recipe = load_recipe(recipe or _earlier_recipe(out, way), recipe_changes)
    import_torch()
    place = named_device(device)
    if dry_run:
        _print_plan(architecture, chosen_recipe, place, as_json=as_json)
    else:
        _train(architecture, chosen_recipe, out, way, place, as_json=as_json)


def _earlier_recipe(out: Path | None, resume: "Resume") -> str:
    """The recipe of the run that is gone on with, or the default one."""
    if out is None and not isinstance(resume, Path):
        return DEFAULT_RECIPE
    import_torch()
    from moeut_compose.train.folder import resume_folder

    return str(resume_folder(out, resume) or DEFAULT_RECIPE)


def _train(
    spec: "ModelSpec",
    recipe: "RecipeSpec",
    out: Path | None,
    resume: "Resume",
    device: "str | torch.device",
    *,
    as_json: bool,
) -> None:
    from moeut_compose.progress import format_duration, make_reporter
    from moeut_compose.train.run import train as train_run
    from moeut_compose.world import started_world

    result = train_run(
        spec, recipe, out=out, resume=resume, argv=sys.argv, reporter=make_reporter(), device=device
    )
    if not started_world().is_main:
        return
    validation = result.validation
    if as_json:
        print_json(
            {
                "run": str(result.folder),
                "checkpoint": str(result.checkpoint),
                "step": result.step,
                "tokens": result.tokens,
                "loss": result.loss,
                **{f"validation_{key}": value for key, value in validation.to_dict().items()},
                "sample": result.sample,
                "plot": str(result.plot),
                "seconds": result.seconds,
            }
        )
        return
    print(f"{spec.name}: {result.step:,} steps, {result.tokens:,} tokens, {format_duration(result.seconds)}")
    print(
        f"validation perplexity  {validation.perplexity:.2f}  ({validation.bits_per_byte:.3f} bits per byte)"
    )
    print("sample")
    for line in result.sample.splitlines() or [""]:
        print(f"  {line}")
    print(f"loss plot   {result.plot}")
    print(f"run folder  {result.folder}")


def _print_plan(
    spec: "ModelSpec", recipe: "RecipeSpec", device: "str | torch.device", *, as_json: bool
) -> None:
    from moeut_compose.train.plan import plan_training

    plan = plan_training(spec, recipe, device=device)
    if as_json:
        print_json(plan.to_dict())
    else:
        from moeut_compose.cli.plan import print_plan

        print_plan(plan)
