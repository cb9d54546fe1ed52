"""A CSV that lists images: ``file``, the label column or 0/1 columns, and perhaps ``split``.

Or a folder that holds one CSV a split, ``train.csv`` with ``val.csv`` or ``test.csv``.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import shorten
from rtl_dist.prepare.sources.items import Item, Source, check_labels, single_label_source
from rtl_dist.prepare.splits import SPLIT_OF, SPLIT_ORDER, TRAIN

FILE, SPLIT = "file", "split"


@dataclass(frozen=True)
class _Row:
    """One line's cells by column, stripped; ``where`` names file and line in error messages."""

    where: str
    cells: dict[str, str]


def csv_files_in(folder: Path) -> dict[str, Path]:
    """The folder's CSV a split, in the order train, val, test; empty when none bears such a name.

    Raises:
        DataError: two of them name the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.csv")):
        split = SPLIT_OF.get(path.stem.lower())
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{folder} has two tables for split {split!r}, {found[split].name} and {path.name}:"
                " join them or move one away"
            )
        found[split] = path
    return {split: found[split] for split in SPLIT_ORDER if split in found}


def read_csv(path: Path, labels: Sequence[str] | None) -> Source:
    """One CSV. Without a ``split`` column all of it is train. Raises as ``read_csv_folder``."""
    header, rows = _read_table(path)
    return _source(path.parent, header, rows, labels, path)


def read_csv_folder(root: Path, tables: dict[str, Path], labels: Sequence[str] | None) -> Source:
    """One CSV a split, all with the same columns; paths are relative to the folder.

    Raises:
        DataError: names the table, the line, the column and the cure.
        UserError: ``labels`` names a column that is not there.
    """
    first: list[str] = []
    rows: list[_Row] = []
    for split, path in tables.items():
        header, its_rows = _read_table(path)
        if SPLIT in header:
            raise DataError(
                f"{path} has a column `{SPLIT}`, but its name already says its split: remove the"
                " column, or pack one CSV that lists every split"
            )
        first = first or header
        if set(header) != set(first):
            odd = sorted(set(header) ^ set(first))[0]
            raise DataError(
                f"the columns of {path} differ from those of {next(iter(tables.values())).name}:"
                f" {odd!r} is in one of them only; give both the same columns"
            )
        rows += [_Row(row.where, {**row.cells, SPLIT: split}) for row in its_rows]
    return _source(root, [*first, SPLIT], rows, labels, next(iter(tables.values())))


def _read_table(path: Path) -> tuple[list[str], list[_Row]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            _check_header(path, header)
            rows = []
            for cells in reader:
                where = f"{path} line {reader.line_num}"
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{where} has {len(cells)} cells where the header has {len(header)}: give"
                        " it one cell a column (quote a cell that holds a comma)"
                    )
                rows.append(_Row(where, {k: v.strip() for k, v in zip(header, cells, strict=True)}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; save it as a CSV in UTF-8") from error
    if not rows:
        raise DataError(f"{path} has a header but no rows: add a row an image")
    return header, rows


def _check_header(path: Path, header: list[str]) -> None:
    if FILE not in header:
        found = ", ".join(header) if header else "nothing"
        raise DataError(
            f"{path} has no column `{FILE}` (its first line holds: {found}): name the column of"
            f" image paths `{FILE}` and separate columns by commas"
        )
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{path} has two columns {repeated!r}: rename or remove one")


def _source(
    root: Path, header: list[str], rows: list[_Row], labels: Sequence[str] | None, path: Path
) -> Source:
    columns = [name for name in header if name not in (FILE, SPLIT)]
    if labels is not None:
        columns = list(check_labels(labels, columns, "label column"))
    if not columns:
        raise DataError(f"{path} has no label column: add one, or a 0/1 column a class")
    items = _items(root, rows)
    if len(columns) == 1:
        names = [_filled(row, columns[0]) for row in rows]
        pairs = list(zip(items, names, strict=True))
        return single_label_source(root, pairs, None)
    labelled = [
        Item(item.name, item.split, _numbers(row, columns))
        for item, row in zip(items, rows, strict=True)
    ]
    return Source(root=root, task=MULTI_LABEL, classes=tuple(columns), items=labelled)


def _items(root: Path, rows: list[_Row]) -> list[Item]:
    """An item a row, unlabelled; each file must exist and be listed once."""
    lines: dict[str, str] = {}
    items = []
    for row in rows:
        name = posixpath.normpath(_filled(row, FILE))
        if os.path.isabs(name):
            raise DataError(
                f"{row.where} names {name} by an absolute path: write it relative to the CSV's"
                " folder, so that the data set does not depend on this machine"
            )
        if name in lines:
            raise DataError(
                f"{row.where} lists {name} again, after {lines[name]}: list each image once"
            )
        lines[name] = row.where
        if not (root / name).is_file():
            raise DataError(
                f"{row.where} names {name}, but there is no such file in {root}: correct the path"
                " or remove the line"
            )
        items.append(Item(name, _split(row), ()))
    return items


def _split(row: _Row) -> str:
    if SPLIT not in row.cells:
        return TRAIN
    value = row.cells[SPLIT]
    if value.lower() not in SPLIT_OF:
        raise DataError(
            f"{row.where} has {value!r} in column `{SPLIT}`: write {shorten(sorted(SPLIT_OF))}"
        )
    return SPLIT_OF[value.lower()]


def _filled(row: _Row, column: str) -> str:
    if not row.cells[column]:
        raise DataError(f"{row.where} has nothing in column `{column}`: fill it or remove the line")
    return row.cells[column]


def _numbers(row: _Row, columns: list[str]) -> tuple[int, ...]:
    for column in columns:
        if row.cells[column] not in ("0", "1"):
            raise DataError(
                f"{row.where} has {row.cells[column]!r} in column {column!r}, where several label"
                " columns mean 0 or 1: write 0 or 1, or name the one label column with --labels"
            )
    return tuple(i for i, column in enumerate(columns) if row.cells[column] == "1")
