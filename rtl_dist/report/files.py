"""Pictures and tables to whole files (see ``rtl_dist.core.files``)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rtl_dist.core.files import replacing, write_text


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Comma-separated, UTF-8, a line feed after each row; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
