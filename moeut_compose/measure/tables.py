"""Tables as text: Markdown and CSV, and how a value looks in one."""

import csv
import io
import json
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, n_text_columns: int = 1) -> str:
    """A Markdown table; the first `n_text_columns` lean left, the others are numbers and lean right."""
    rule = ["---" if column < n_text_columns else "---:" for column in range(len(header))]
    lines = (header, rule, *rows)
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def csv_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def cell(value: object) -> str:
    """A value as people read it."""
    match value:
        case None:
            return "–"
        case bool() | str():
            return str(value)
        case float():
            return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
        case int():
            return f"{value:,}"
        case _:
            return json.dumps(value, ensure_ascii=False)
