"""The runs of a sweep, one after the other, each in a folder of its own below the sweep's.

What is on disk decides what is left to do: a finished run is not touched again, a cut one goes on where it stopped, one
that failed is tried again. So the same command after any interruption ends in the same table.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import write_atomically
from moeut_compose.measure.compare import COLUMNS, Row, row_of_run
from moeut_compose.measure.tables import cell, csv_table, markdown_table
from moeut_compose.progress import SilentReporter
from moeut_compose.spec.io import SpecError, dump_yaml, load_recipe, load_spec
from moeut_compose.train import folder as run_folder
from moeut_compose.train.checkpoint import list_checkpoints, step_folder
from moeut_compose.train.device import choose_device, forget_used_memory
from moeut_compose.train.errors import Interrupted, TrainError
from moeut_compose.train.load_table import ROUTER_LOAD
from moeut_compose.train.metrics import read_rows
from moeut_compose.train.run import train, with_absolute_paths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeut_compose.progress import Reporter
    from moeut_compose.spec.expand import PlannedRun, Sweep

SWEEP = "sweep.yaml"
RESULTS = "results"

Status = Literal["done", "failed", "waiting"]


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    run: PlannedRun
    status: Status
    error: str | None = None
    """Why it failed."""
    row: Row | None = None
    """What a comparison says of it; None without metrics."""

    def to_dict(self) -> dict[str, Any]:
        row = {} if self.row is None else self.row.to_dict()
        return {
            "run": self.run.name,
            "status": self.status,
            "error": self.error,
            "changes": self.run.changes,
            **{column: row.get(column) for column in COLUMNS[1:]},
        }


def sweep_folder(sweep: Sweep) -> Path:
    """Where a sweep goes unless told otherwise: always the same place, so that it can go on."""
    return run_folder.runs_root() / sweep.spec.name.replace("/", "-")


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    argv: Sequence[str] = (),
    reporter: Reporter | None = None,
    device: str | torch.device = "auto",
) -> list[Outcome]:
    """Train every run of `sweep` that is not finished in `folder`, and keep the table there up to date.

    A run that fails does not stop the others. Raises `Interrupted` after a signal, with that run saved, and `RunError`
    if another process works in the folder.
    """
    reporter = reporter or SilentReporter()
    place = choose_device(device)
    outcomes = [Outcome(run, "waiting") for run in sweep.runs]
    with run_folder.locked(folder):
        write_atomically(folder / SWEEP, dump_yaml(sweep.spec).encode())
        write_results(folder, outcomes)
        for number, run in enumerate(sweep.runs):
            if is_finished(folder / run.name, run):
                reporter.note(f"run {number + 1} of {len(outcomes)}: {run.name} is finished")
                outcomes[number] = _with_row(Outcome(run, "done"), folder)
            else:
                reporter.note(f"run {number + 1} of {len(outcomes)}: {run.name}")
                outcomes[number] = _with_row(_train(run, folder, argv, reporter, place), folder)
            write_results(folder, outcomes)
    return outcomes


def is_finished(folder: Path, run: PlannedRun) -> bool:
    """Whether a run folder holds this very run, trained, evaluated and drawn to its end."""
    if not run_folder.is_run(folder) or not step_folder(folder, run.steps).is_dir():
        return False
    try:
        stored = load_spec(folder / run_folder.ARCHITECTURE), load_recipe(folder / run_folder.RECIPE)
    except SpecError:
        return False
    if stored != (run.architecture, with_absolute_paths(run.recipe)):
        return False
    last = [row["step"] for row in read_rows(folder / "metrics.jsonl") if row["event"] == "validation"][-1:]
    return last == [run.steps] and (folder / run_folder.PLOTS / "loss.png").is_file()


def _train(
    run: PlannedRun, folder: Path, argv: Sequence[str], reporter: Reporter, device: torch.device
) -> Outcome:
    """One run to its end, or the reason why not, whatever it is: the others must not suffer for it."""
    _clear_torn_start(folder / run.name)
    forget_used_memory(device)
    error: str | None = None
    try:
        train(
            run.architecture,
            run.recipe,
            out=folder / run.name,
            resume="auto",
            argv=argv,
            reporter=reporter,
            device=device,
        )
    except Interrupted:
        reporter.warn("the sweep stops here; the same command goes on")
        raise
    except (TrainError, DataError, SpecError, OSError, ValueError, RuntimeError) as failure:
        error = " ".join(str(failure).split()) or type(failure).__name__
        reporter.warn(f"{run.name} failed: {error}")
    gc.collect()
    torch.compiler.reset()  # compiled layers of one architecture count against the limit of the next
    return Outcome(run, "failed" if error else "done", error)


def _clear_torn_start(folder: Path) -> None:
    """Take away what a process left that was killed before its first checkpoint: nothing of it is of use."""
    if not folder.is_dir() or list_checkpoints(folder):
        return
    texts = (run_folder.TOKENIZER, run_folder.RECIPE, run_folder.ARCHITECTURE, run_folder.ENVIRONMENT)
    for name in ("metrics.jsonl", "metrics.csv", ROUTER_LOAD, *texts):
        (folder / name).unlink(missing_ok=True)
    for name in (run_folder.VALIDATION, run_folder.PLOTS, "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _with_row(outcome: Outcome, folder: Path) -> Outcome:
    run = outcome.run
    if not (folder / run.name / "metrics.jsonl").is_file():
        return outcome
    try:
        row = row_of_run(folder / run.name, run.architecture, run.context)
    except ValueError as error:
        return Outcome(run, "failed", str(error))
    return Outcome(run, outcome.status, outcome.error, row)


def table_of(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: the run, its status, what sets it apart, and the columns of a comparison that say anything."""
    documents = [outcome.to_dict() for outcome in outcomes]
    keys = list(dict.fromkeys(key for document in documents for key in document["changes"]))
    varied = [key for key in keys if len({repr(d["changes"].get(key)) for d in documents}) > 1]
    columns = [column for column in COLUMNS[1:] if any(d[column] is not None for d in documents)]
    rows = [
        [
            d["run"],
            d["status"],
            *(d["changes"].get(key) for key in varied),
            *(d[column] for column in columns),
        ]
        for d in documents
    ]
    return ["run", "status", *varied, *columns], rows


def write_results(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """`results.json`, `.csv` and `.md` of a sweep."""
    header, rows = table_of(outcomes)
    document = json.dumps([outcome.to_dict() for outcome in outcomes], indent=1, ensure_ascii=False)
    shown = markdown_table(header, [[cell(value) for value in row] for row in rows], n_text_columns=2)
    for ending, text in (("json", f"{document}\n"), ("csv", csv_table(header, rows)), ("md", shown)):
        write_atomically(folder / f"{RESULTS}.{ending}", text.encode())
