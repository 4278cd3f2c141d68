"""Results on stdout: JSON documents and plain tables that never wrap or lose a digit."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from moeut_compose.measure.tables import csv_table, markdown_table


def as_json_text(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False)


def print_json(document: Any) -> None:
    print(as_json_text(document))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, n_text_columns: int = 1) -> None:
    """Columns side by side: the first `n_text_columns` are text and lean left, the others are numbers."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, *rows):
        cells = [
            cell.ljust(width) if column < n_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    sys.stdout.write(csv_table(header, rows))


def print_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, n_text_columns: int = 1) -> None:
    sys.stdout.write(markdown_table(header, rows, n_text_columns=n_text_columns))
