"""Predictions as a Parquet file, through pyarrow, which is an extra."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rtl_dist.core.errors import UserError
from rtl_dist.inference.rows import Column

MARK = b"rtl_dist"  # in the file's metadata: that it is ours
_ROWS_AT_ONCE = 20_000


def require_pyarrow() -> None:
    """Raises UserError: it is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "--out: Parquet is written by pyarrow, which is not installed: pip install"
            " 'rtl_dist[parquet]', or choose a .csv or .jsonl file"
        )


def write_parquet(lines: Path, columns: Sequence[Column], out: Path) -> None:
    """A table of the values in ``lines`` (see ``value_lines``), some thousand rows in memory."""
    import pyarrow
    from pyarrow import parquet

    types = {
        "text": pyarrow.string(),
        "number": pyarrow.float32(),
        "flag": pyarrow.bool_(),
        "texts": pyarrow.list_(pyarrow.string()),
        "numbers": pyarrow.list_(pyarrow.float32()),
    }
    fields = [pyarrow.field(column.name, types[column.kind]) for column in columns]
    schema = pyarrow.schema(fields, metadata={MARK: b"predict"})
    with parquet.ParquetWriter(out, schema) as writer, open(lines, encoding="utf-8") as file:
        for rows in _in_batches(map(json.loads, file)):
            values = [[_sound(value) for value in column] for column in zip(*rows, strict=True)]
            arrays = [
                pyarrow.array(column, field.type)
                for column, field in zip(values, fields, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def is_ours(path: Path) -> bool:
    """Whether a Parquet file was written here."""
    import pyarrow
    from pyarrow import parquet

    try:
        return MARK in (parquet.read_schema(path).metadata or {})
    except (OSError, pyarrow.ArrowException):
        return False


def _in_batches(rows: Iterator[list[Any]]) -> Iterator[list[list[Any]]]:
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        yield batch


def _sound(value: Any) -> Any:
    """Names that are no UTF-8 are written as other formats write them."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value
