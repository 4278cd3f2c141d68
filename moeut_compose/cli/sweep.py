"""`sweep`: many runs from one file, and their table."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeut_compose.cli.arguments import JsonOption
from moeut_compose.cli.devices import DeviceOption, import_torch, named_device
from moeut_compose.cli.failures import FAILED, complain, wrong_usage
from moeut_compose.cli.output import print_csv, print_json, print_markdown, print_table
from moeut_compose.measure.macs import count_macs
from moeut_compose.measure.params import count_params
from moeut_compose.measure.tables import cell

if TYPE_CHECKING:
    from moeut_compose.spec.expand import PlannedRun, Sweep
    from moeut_compose.train.sweep import Outcome


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file; see `schema sweep`.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of all runs; default: `runs/<name>`.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the runs with their parameters, MACs and tokens.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line for each run.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table.")] = False,
) -> None:
    """Train architectures after recipes in every combination, one after the other, and set them side by side.

    The same command goes on after any interruption: finished runs are skipped, a cut one resumes. Runs that fail are
    reported, do not stop the others, and are tried again next time.

    **Examples**

    - `moeut-compose sweep widths.yaml --dry-run`
    - `moeut-compose sweep widths.yaml --out runs/widths`
    - `moeut-compose compare runs/widths --plot widths.png`
    """
    if as_json + as_csv + as_markdown > 1:
        raise wrong_usage("--json, --csv and --markdown exclude each other")
    from moeut_compose.spec.expand import load_sweep  # most commands read no recipe, and start faster without

    loaded = load_sweep(file)
    form = "json" if as_json else "csv" if as_csv else "markdown" if as_markdown else "table"
    if dry_run:
        _show_plan(loaded, form)
        return
    import_torch()
    place = named_device(device)
    from moeut_compose.progress import make_reporter
    from moeut_compose.train.sweep import run_sweep, sweep_folder

    folder = out or sweep_folder(loaded)
    outcomes = run_sweep(loaded, folder, argv=sys.argv, reporter=make_reporter(), device=place)
    _show_outcomes(loaded, folder, outcomes, form)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        complain(f"error: {outcome.run.name}: {outcome.error}")
    if failed:
        raise typer.Exit(FAILED)


def _show_plan(sweep: "Sweep", form: str) -> None:
    rows = [_planned(run) for run in sweep.runs]
    if form == "json":
        print_json(
            {
                "sweep": sweep.spec.name,
                "runs": [row | {"changes": run.changes} for row, run in zip(rows, sweep.runs, strict=True)],
            }
        )
        return
    _show(list(rows[0]), [list(row.values()) for row in rows], form, n_text_columns=3)
    if form == "table":
        print(f"\n{len(rows)} runs, {sum(row['tokens'] for row in rows):,} tokens")


def _planned(run: "PlannedRun") -> dict[str, Any]:
    return {
        "run": run.name,
        "architecture": run.architecture.name,
        "recipe": run.recipe.name,
        "params": count_params(run.architecture).total,
        "macs_per_token": count_macs(run.architecture, run.context).total_per_token,
        "steps": run.steps,
        "tokens": run.tokens,
    }


def _show_outcomes(sweep: "Sweep", folder: Path, outcomes: "list[Outcome]", form: str) -> None:
    from moeut_compose.train.sweep import table_of

    if form == "json":
        runs = [outcome.to_dict() for outcome in outcomes]
        print_json({"sweep": sweep.spec.name, "folder": str(folder), "runs": runs})
        return
    header, rows = table_of(outcomes)
    _show(header, rows, form, n_text_columns=2)
    if form == "table":
        print(f"\nsweep folder  {folder}")


def _show(header: list[str], rows: list[list[Any]], form: str, *, n_text_columns: int) -> None:
    if form == "csv":
        print_csv(header, rows)
        return
    show = print_markdown if form == "markdown" else print_table
    show(header, [[cell(value) for value in row] for row in rows], n_text_columns=n_text_columns)
