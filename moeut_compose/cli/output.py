"""Results on stdout: JSON documents and plain tables that never wrap or lose a digit."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from moeut_compose.measure.tables import csv_table, markdown_table


def as_json_text(document: Any) -> str:
    """JSON; numbers that are none, which JSON does not have, become null."""
    return json.dumps(_finite(document), indent=2, ensure_ascii=False)


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


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
