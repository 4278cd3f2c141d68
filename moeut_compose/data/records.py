"""Files of records, one document each: JSON Lines, packed or not, and Parquet, told apart by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, BinaryIO

from moeut_compose.data.errors import DataError
from moeut_compose.data.files import UNREADABLE, as_text, import_arrow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ROWS = 64
"""Rows of a Parquet file held at once; a document may be large."""
_BUFFER_BYTES = 1 << 20


def read_records(file: BinaryIO, path: Path, field: str) -> Iterator[str]:
    """The text under `field` of every record. Raises `DataError` with the file and the line or row at fault."""
    return (_read_parquet if path.suffix == ".parquet" else _read_lines)(file, path, field)


def _read_lines(file: BinaryIO, path: Path, field: str) -> Iterator[str]:
    try:
        with as_text(file, path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(line, field, path, number)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error


def _text_of(line: str, field: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}:{error.colno}: not JSON: {error.msg}") from error
    if not isinstance(record, dict) or field not in record:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{path}:{number}: no key {field!r} (found: {keys}); set data.field")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{path}:{number}: {field} is not a text but {type(text).__name__}")
    return text


def _read_parquet(file: BinaryIO, path: Path, field: str) -> Iterator[str]:
    arrow = import_arrow("Parquet files")
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        if field not in table.schema_arrow.names:
            found = ", ".join(table.schema_arrow.names)
            raise DataError(f"{path}: no column {field!r} (found: {found}); set data.field")
        for batch in table.iter_batches(batch_size=_ROWS, columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                number += 1
                if not isinstance(text, str):
                    raise DataError(f"{path}: row {number}: {field} is not a text but {type(text).__name__}")
                yield text
    except (OSError, UnicodeDecodeError, arrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number} ({error})") from error
