"""`train`, `evaluate` and `generate`: the commands that make runs and use them."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeut_compose.cli.arguments import JsonOption, OverridesArgument, check_overrides
from moeut_compose.cli.failures import complain, leaving_on_interrupt, wrong_usage
from moeut_compose.cli.output import print_json
from moeut_compose.spec.find import NotFound, did_you_mean, nearest
from moeut_compose.spec.io import is_override, load_recipe, load_spec, split_overrides

if TYPE_CHECKING:
    import torch

    from moeut_compose.spec.model import ModelSpec
    from moeut_compose.spec.recipe import RecipeSpec
    from moeut_compose.train.folder import Resume
    from moeut_compose.train.run import Run

DEFAULT_RECIPE = "default"
TASKS = ("perplexity",)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]


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
    _import_torch()
    place = _device(device)
    if dry_run:
        _print_plan(architecture, chosen_recipe, place, as_json=as_json)
    else:
        _train(architecture, chosen_recipe, out, way, place, as_json=as_json)


def _earlier_recipe(out: Path | None, resume: "Resume") -> str:
    """The recipe of the run that is gone on with, or the default one."""
    if out is None and not isinstance(resume, Path):
        return DEFAULT_RECIPE
    _import_torch()
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

    result = train_run(
        spec, recipe, out=out, resume=resume, argv=sys.argv, reporter=make_reporter(), device=device
    )
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


def evaluate(
    run: RunArgument,
    tasks: Annotated[str, typer.Option(metavar="TASK,...", help=f"Of: {', '.join(TASKS)}.")] = "perplexity",
    windows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Windows of held-out text; default: the recipe's.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows at once; changes no result.")
    ] = 8,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure the perplexity of a trained run on its held-out text.

    **Example**

    - `moeut-compose evaluate runs/20260101-120000-moeut_tiny --json`
    """
    unknown = [task for task in tasks.split(",") if task not in TASKS]
    if unknown:
        raise wrong_usage(f"--tasks: {unknown[0]!r} is not one of {', '.join(TASKS)}")
    _import_torch()
    path = _run_folder(run)
    from moeut_compose.evaluate.perplexity import evaluate_run
    from moeut_compose.progress import make_reporter

    loaded = _load_run(path, device)
    result = evaluate_run(loaded, windows=windows, batch_size=batch_size, reporter=make_reporter())
    if as_json:
        print_json({"name": loaded.spec.name, "run": str(loaded.path), **result})
        return
    print(f"{loaded.spec.name} at step {result['step']:,}, {result['tokens']:,} tokens of held-out text")
    print(f"perplexity     {result['perplexity']:.3f}")
    print(f"cross entropy  {result['cross_entropy']:.4f} nats per token")
    print(f"bits per byte  {result['bits_per_byte']:.4f}")


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the text begins with.")] = "",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=0)] = 100,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Choose among the K likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Choose among tokens of this joint probability.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same text.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let a trained run continue a text.

    **Example**

    - `moeut-compose generate runs/20260101-120000-moeut_tiny --prompt "The sea" --temperature 0.7`
    """
    _import_torch()
    path = _run_folder(run)
    from moeut_compose.generate import generate as write

    loaded = _load_run(path, device)
    try:
        text = write(
            loaded.model,
            loaded.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stream=_ignore if as_json else _say,
        )
    except ValueError as error:
        raise wrong_usage(str(error)) from None
    if as_json:
        print_json(
            {
                "name": loaded.spec.name,
                "run": str(loaded.path),
                "step": loaded.step,
                "prompt": prompt,
                "text": text,
            }
        )
    else:
        print()


def _import_torch() -> None:
    """The slow part of every command here."""
    with leaving_on_interrupt():
        import torch  # noqa: F401


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass


def _run_folder(name: str) -> Path:
    """The folder that RUN names, also by its last part below the folder of runs. Raises `NotFound`."""
    from moeut_compose.train.folder import runs_root

    for path in (Path(name).expanduser(), runs_root() / name):
        if path.exists():
            return path
    known = [path.name for path in sorted(runs_root().glob("*"), reverse=True) if path.is_dir()]
    raise NotFound(f"{name}: no such run{did_you_mean(nearest(Path(name).name, known))}")


def _load_run(path: Path, device: str) -> "Run":
    from moeut_compose.train.device import choose_device
    from moeut_compose.train.run import load_run

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        return load_run(path, device=choose_device(_device(device)))


def _device(name: str) -> "str | torch.device":
    if name == "auto":
        return name
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise wrong_usage(f"--device {name}: not a device; write auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise wrong_usage(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
