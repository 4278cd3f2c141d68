"""`match` and `compare`: one architecture against another."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from moeut_compose.cli.arguments import JsonOption, SpecArgument, architecture_overrides, specs_and_overrides
from moeut_compose.cli.failures import complain, failed, wrong_usage
from moeut_compose.cli.output import print_csv, print_json, print_markdown, print_table
from moeut_compose.measure.compare import COLUMNS, Row, row_of_run, row_of_spec
from moeut_compose.measure.match import Match, NoMatch, match_spec
from moeut_compose.measure.tables import cell
from moeut_compose.spec.find import reference
from moeut_compose.spec.io import load_recipe, load_spec
from moeut_compose.spec.problems import SpecError


class By(StrEnum):
    """What is to be equal."""

    params = "params"
    macs = "macs"
    active = "active"


def match(
    spec: SpecArgument,
    to: Annotated[str, typer.Option(metavar="SPEC", help="The architecture to match.")],
    by: Annotated[By, typer.Option(help="Parameters, MACs per token, or active parameters.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SHARE]",
            help="The free integer; several keep their SHAREs. Default: the size of the first feedforward.",
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="For MACs. Default: that of the target.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest relative difference that is still a match.")
    ] = 0.01,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the matched architecture here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Solve for an integer of SPEC that brings it closest to another architecture.

    **Examples**

    - `moeut-compose match moeut_244m --to dense_244m --by params`
    - `moeut-compose match moeut_tiny --to dense_tiny --by macs --vary stages.0.layers.0.feedforward.top_k -o mine.yaml`
    """
    if out is not None and out.exists():
        raise wrong_usage(f"{out} exists already")
    try:
        found = match_spec(
            load_spec(spec),
            load_spec(to),
            by=by.value,
            vary=_shares(vary or []),
            seq_len=seq_len,
            tolerance=tolerance,
        )
    except NoMatch as error:
        raise failed(str(error)) from None
    except ValueError as error:
        raise wrong_usage(str(error)) from None
    if out is not None:
        _write_matched(spec, found, out)
    if as_json:
        print_json(found.to_dict())
        return
    rows = [[path, f"{value:,}"] for path, value in found.values.items()]
    rows.append([f"{found.by} of {found.name}", f"{found.achieved:,}"])
    rows.append([f"{found.by} of {found.target_name}", f"{found.target:,}"])
    rows.append(["difference", f"{found.achieved - found.target:+,} ({found.deviation:+.4%})"])
    if found.next_best is not None:
        rows.append(["next best difference", f"{found.next_best - found.target:+,}"])
    print_table([f"{found.name} like {found.target_name}", ""], rows)


def _shares(vary: list[str]) -> dict[str, int] | None:
    shares: dict[str, int] = {}
    for entry in vary:
        path, _, share = entry.partition(":")
        if share and not (share.isdigit() and int(share)):
            raise wrong_usage(f"--vary {entry}: the share {share!r} is not a positive integer")
        shares[path] = int(share or 1)
    return shares or None


def _write_matched(base: str, found: Match, path: Path) -> None:
    """A spec that extends the original with the values found. One that would extend itself is not left behind."""
    document = {
        "extends": reference(base, "architectures", path.parent),
        "name": path.stem,
        "description": f"{found.name} with the {found.by} of {found.target_name}",
        **found.values,
    }
    path.write_text(
        yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=sys.maxsize), encoding="utf-8"
    )
    try:
        load_spec(path)
    except SpecError as error:
        path.unlink()
        raise wrong_usage(
            f"{path} would be no architecture of its own; choose another file: {error}"
        ) from None
    complain(f"written: {path}")


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|SPEC", help="Run folders, sweep folders and architectures, in any mixture."
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw into a .png, .svg or .pdf file.")
    ] = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line for each model.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table.")] = False,
) -> None:
    """One table, and plots: parameters, MACs, tokens, loss, perplexity, speed, memory.

    **Examples**

    - `moeut-compose compare dense_244m moeut_244m sut_244m --plot sizes.png`
    - `moeut-compose compare runs/* --markdown`
    """
    if as_json + as_csv + as_markdown > 1:
        raise wrong_usage("--json, --csv and --markdown exclude each other")
    names, overrides = specs_and_overrides(models)
    changes = architecture_overrides(overrides)
    rows = [_row(name, changes) for given in names for name in _runs_of(given)]
    if plot is not None:
        _plot(rows, plot)
    if as_json:
        print_json([row.to_dict() for row in rows])
    elif as_csv:
        print_csv(COLUMNS, [[getattr(row, column) for column in COLUMNS] for row in rows])
    else:
        _print(rows, as_markdown=as_markdown)


def _runs_of(name: str) -> list[str]:
    """The runs of a sweep folder that have metrics, in the order of the sweep; anything else stands for itself."""
    results = Path(name) / "results.json"
    if not (Path(name) / "sweep.yaml").is_file() or not results.is_file():
        return [name]
    try:
        runs = [Path(name) / entry["run"] for entry in json.loads(results.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise failed(f"{results}: not the table of a sweep") from None
    trained = [str(run) for run in runs if (run / "metrics.jsonl").is_file()]
    if not trained:
        raise failed(f"{name}: no run of this sweep has metrics yet")
    return trained


def _row(name: str, overrides: list[str]) -> Row:
    folder = Path(name)
    if not (folder / "metrics.jsonl").is_file():
        return row_of_spec(load_spec(name, overrides))
    spec = load_spec(name)
    try:
        return row_of_run(folder, spec, load_recipe(name).context or spec.context_length)
    except ValueError as error:
        raise failed(str(error)) from None


def _plot(rows: list[Row], path: Path) -> None:
    from moeut_compose.measure.plots import plot_comparison

    try:
        plot_comparison(rows, path)
    except ValueError as error:
        raise wrong_usage(str(error)) from None
    complain(f"drawn: {path}")


def _print(rows: list[Row], *, as_markdown: bool) -> None:
    columns = [column for column in COLUMNS if any(getattr(row, column) is not None for row in rows)]
    cells = [[cell(getattr(row, column)) for column in columns] for row in rows]
    (print_markdown if as_markdown else print_table)(columns, cells)
