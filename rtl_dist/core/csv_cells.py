"""Tables that a spreadsheet may open: no cell of them is a formula, and each can be had back.

A spreadsheet runs a cell that begins with ``=``, ``+``, ``-`` or ``@``, whoever wrote it: a file's
name can. So text that begins so, or so behind apostrophes, has one more apostrophe put before it,
and ``cell_as_was`` takes one away again. Numbers of ours stay as they are.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

# with the full-width forms that some languages' spreadsheets take for the same
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def safe_cell(value: Any) -> Any:
    """A value as it is written."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def cell_as_was(written: str) -> str:
    """What ``safe_cell`` was given."""
    return written[1:] if written.startswith("'") and _FORMULA.match(written) else written


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated, a line feed after each row; None becomes an empty cell."""
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in chain((header,), rows):
        cells = list(map(safe_cell, row))
        # which ends a line for whoever reads it, but not for the writer
        ends_a_line = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (quoted if ends_a_line else plain).writerow(cells)
    return text.getvalue()


def csv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """The rows that ``csv_text`` was given, the header first. Raises csv.Error."""
    return (list(map(cell_as_was, row)) for row in csv.reader(lines, strict=True))
