"""The zero-shot part of `evaluate`: its options, and its results as a table or one document."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.output import print_table

if TYPE_CHECKING:
    from moeut_compose.evaluate.protocols import ProtocolName
    from moeut_compose.evaluate.task_result import TaskResult
    from moeut_compose.train.run import Run

PROTOCOLS: "tuple[ProtocolName, ...]" = ("published", "harness")

HUB = "hub"
TaskDataOption = Annotated[
    str | None,
    typer.Option(
        "--task-data",
        metavar=f"DIR|{HUB}",
        help=f"Folder with the files of the benchmarks, or `{HUB}`: Hugging Face datasets, kept in the cache.",
    ),
]
ProtocolOption = Annotated[
    str, typer.Option(metavar="|".join(PROTOCOLS), help="Rules of the paper, or of lm-evaluation-harness.")
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Only the first N items, of each paradigm or type where there are."
    ),
]
AnewOption = Annotated[bool, typer.Option("--anew", help="Do not use results kept in the run folder.")]


def checked_protocol(name: str) -> "ProtocolName":
    for protocol in PROTOCOLS:
        if name == protocol:
            return protocol
    raise wrong_usage(f"--protocol: {name!r} is not one of {', '.join(PROTOCOLS)}")


def checked_folder(folder: str | None, tasks: list[str]) -> Path | None:
    """The folder with the files; None stands for the hub."""
    if folder is None:
        raise wrong_usage(
            f"--tasks {','.join(tasks)}: name the folder with the files in --task-data DIR, "
            f"or read Hugging Face datasets with --task-data {HUB}"
        )
    return None if folder == HUB else Path(folder)


def results_document(run: "Run", protocol: str, results: "list[TaskResult]") -> dict[str, Any]:
    """The results with stable keys; `average` is null unless all benchmarks were run."""
    from moeut_compose.evaluate.task_result import average

    return {
        "name": run.spec.name,
        "run": str(run.path),
        "step": run.step,
        "protocol": protocol,
        "tasks": {result.identity.task: result.to_dict() for result in results},
        "average": average(results),
    }


def print_results(results: "list[TaskResult]") -> None:
    """A row for each benchmark, in percent."""
    from moeut_compose.evaluate.task_result import average
    from moeut_compose.evaluate.tasks import TASKS

    rows = []
    for result in results:
        low, high = result.confidence_interval
        task = TASKS[result.identity.task]
        interval = f"{100 * low:.2f} – {100 * high:.2f}"
        rows.append([task.title, f"{100 * result.accuracy:.2f}", interval, f"{result.n:,}"])
    mean = average(results)
    if mean is not None:
        rows.append(["average", f"{100 * mean:.2f}", "", ""])
    print_table(["task", "accuracy %", "95 % interval", "items"], rows)
    for result in results:
        for name, value in result.others.items():
            print(f"{TASKS[result.identity.task].title}: {name.replace('_', ' ')} {value:.4g}")
