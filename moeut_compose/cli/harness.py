"""The lm-evaluation-harness part of `evaluate`: its options, and its results as a table."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeut_compose.cli.failures import failed
from moeut_compose.cli.output import print_table

if TYPE_CHECKING:
    from moeut_compose.progress import Reporter
    from moeut_compose.train.run import Run

HarnessOption = Annotated[
    str | None,
    typer.Option(
        metavar="TASK,...",
        help="Tasks of lm-evaluation-harness (extra `eval`); patterns such as blimp_* are allowed.",
    ),
]
IncludeOption = Annotated[
    Path | None,
    typer.Option("--harness-include", metavar="DIR", help="Folder with YAML files of further harness tasks."),
]


def run_harness(
    run: "Run", tasks: str, include: Path | None, *, limit: int | None, batch_size: int, reporter: "Reporter"
) -> dict[str, Any]:
    """The results of `evaluate_with_harness`; what the harness itself prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        from moeut_compose.data.hub import import_datasets

        import_datasets()
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise failed(
                f"--harness needs lm-evaluation-harness ({error}): pip install 'moeut-compose[eval]'"
            ) from None
        from moeut_compose.evaluate.harness import evaluate_with_harness

        return evaluate_with_harness(
            run, tasks.split(","), include=include, limit=limit, batch_size=batch_size, reporter=reporter
        )


def print_harness(results: dict[str, Any]) -> None:
    """A row for each metric of each task."""
    rows = []
    for task in results["tasks"].values():
        n_items = "" if task["n"] is None else f"{task['n']:,}"
        for metric in task["metrics"]:
            name = metric["metric"] + ("" if metric["filter"] == "none" else f" ({metric['filter']})")
            rows.append([task["title"], name, _number(metric["value"]), _number(metric["stderr"]), n_items])
    print_table(["task", "metric", "value", "± stderr", "items"], rows, n_text_columns=2)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
