"""Which file each sample was made of: ``sources/<split>.csv`` beside the shards.

A key holds what is left of a file's name in plain letters; here the whole name is, as its owner
wrote it. No figure depends on these tables: data sets that have none, or only some, are whole.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rtl_dist.core.csv_cells import csv_rows, csv_text

SOURCES_FOLDER = "sources"
_HEADER = ("sample", "key", "file")


def sources_path(split: str) -> str:
    """Relative to the data set."""
    return f"{SOURCES_FOLDER}/{split}.csv"


def sources_table(rows: Sequence[tuple[str, str]]) -> bytes:
    """The table of a split's (key, file) in the samples' order; names that are no UTF-8 stay."""
    numbered = ((number, *row) for number, row in enumerate(rows))
    return csv_text(_HEADER, numbered).encode("utf-8", "surrogateescape")


def read_sources(path: Path, keys: Mapping[int, str]) -> dict[int, str]:
    """The files of these samples, by their numbers; one is left out where the table has none for
    its key.

    Args:
        keys: by sample number.
    """
    found: dict[int, str] = {}
    try:
        if not path.is_file():
            return found
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as lines:
            for number, row in enumerate(csv_rows(lines), -1):
                if len(row) == len(_HEADER) and keys.get(number) == row[1]:
                    found[number] = row[2]
                    if len(found) == len(keys):
                        break
    except (OSError, csv.Error):  # a help for reading, which fails no run
        pass
    return found
