"""The synthetic part of `evaluate`: accuracy by difficulty, and by number of passes."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeut_compose.cli.failures import wrong_usage
from moeut_compose.cli.output import print_table

if TYPE_CHECKING:
    from moeut_compose.progress import Reporter
    from moeut_compose.train.run import Run

SYNTHETIC = "synthetic"
N_ITEMS = 1000
RepeatsOption = Annotated[
    str | None,
    typer.Option(metavar="N,...", help="Passes to try over shared stages, for the synthetic task."),
]


def checked_repeats(repeats: str | None, tasks: list[str]) -> list[int | None]:
    """The numbers of passes; None is that of training."""
    if repeats is None:
        return [None]
    if SYNTHETIC not in tasks:
        raise wrong_usage(f"--repeats is for --tasks {SYNTHETIC}")
    if not all(number.isdecimal() and int(number) for number in repeats.split(",")):
        raise wrong_usage(f"--repeats: {repeats!r} is not a list of positive numbers such as 3,6,9")
    return [int(number) for number in repeats.split(",")]


def run_synthetic(
    run: "Run", repeats: list[int | None], *, limit: int | None, reporter: "Reporter"
) -> list[dict[str, Any]]:
    """One record for each number of passes."""
    from moeut_compose.evaluate.synthetic import evaluate_synthetic

    return [
        {
            "repeats": number,
            "difficulties": [
                result.to_dict()
                for result in evaluate_synthetic(
                    run, n_items=limit or N_ITEMS, repeats=number, reporter=reporter
                )
            ],
        }
        for number in repeats
    ]


def print_synthetic(results: list[dict[str, Any]]) -> None:
    """A row for each difficulty, a column for each number of passes."""
    header = ["difficulty", "trained"]
    header += [
        "accuracy" if record["repeats"] is None else f"{record['repeats']} passes" for record in results
    ]
    rows = []
    for place, first in enumerate(results[0]["difficulties"]):
        cells = [f"{record['difficulties'][place]['accuracy']:.3f}" for record in results]
        trained = "yes" if first["is_trained"] else "no"
        rows.append(
            [str(first["difficulty"]), trained, *cells, f"{first['shortcut']:.3f}", f"{first['n']:,}"]
        )
    print_table([*header, "shortcut", "items"], rows, n_text_columns=2)
