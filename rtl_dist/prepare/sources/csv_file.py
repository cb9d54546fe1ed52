"""A CSV that lists images: ``file``, the label column or 0/1 columns, and perhaps ``split``.

Or a folder that holds one CSV a split, ``train.csv`` with ``val.csv`` or ``test.csv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import shown
from rtl_dist.prepare.sources.csv_table import (
    SPLIT,
    Columns,
    Row,
    choose_columns,
    read_table,
    split_of,
)
from rtl_dist.prepare.sources.items import Item, Source, single_label_source
from rtl_dist.prepare.sources.layout import table_note, tables_in
from rtl_dist.prepare.sources.listed_files import ListedFiles
from rtl_dist.prepare.splits import SPLIT_ORDER, split_named


def csv_files_in(folder: Path) -> dict[str, Path]:
    """The folder's table a split, in the order train, val, test; empty when none bears such a name.

    Raises:
        DataError: two of them name the same split.
    """
    found: dict[str, Path] = {}
    for name in tables_in(folder):
        path = folder / name
        split = split_named(path.stem)
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{shown(str(folder))} has two tables for split {split!r},"
                f" {shown(found[split].name)} and {shown(path.name)}: join them or move one away"
            )
        found[split] = path
    return {split: found[split] for split in SPLIT_ORDER if split in found}


def read_csv(path: Path, labels: Sequence[str] | None, file_column: str | None = None) -> Source:
    """One CSV. Without a ``split`` column all of it is train. Raises as ``read_csv_folder``."""
    header, rows = read_table(path)
    return _source(path, header, rows, labels, file_column)


def read_csv_folder(
    root: Path,
    tables: dict[str, Path],
    labels: Sequence[str] | None,
    file_column: str | None = None,
) -> Source:
    """One CSV a split, all with the same columns; paths are relative to the folder.

    Raises:
        DataError: names the table, the line, the column and the cure.
        UserError: ``labels`` or ``file_column`` names a column that is not there.
    """
    first: list[str] = []
    rows: list[Row] = []
    for split, path in tables.items():
        header, its_rows = read_table(path)
        if SPLIT in header:
            raise DataError(
                f"{shown(str(path))} has a column `{SPLIT}`, but its name already says its split:"
                " remove the column, or pack one CSV that lists every split"
            )
        first = first or header
        if set(header) != set(first):
            odd = sorted(set(header) ^ set(first))[0]
            raise DataError(
                f"the columns of {shown(str(path))} differ from those of"
                f" {next(iter(tables.values())).name}: {odd!r} is in one of them only; give both"
                " the same columns, or pack one of them by its path"
            )
        rows += [Row(row.where, {**row.cells, SPLIT: split}) for row in its_rows]
    one = next(iter(tables.values()))
    source = _source(one, [*first, SPLIT], rows, labels, file_column)
    read = {path.name for path in tables.values()}
    unread = [name for name in tables_in(root) if name not in read]
    return replace(source, notes=[*source.notes, *table_note(root, unread)])


def _source(
    path: Path,
    header: list[str],
    rows: list[Row],
    labels: Sequence[str] | None,
    file_column: str | None,
) -> Source:
    root = path.parent
    files = ListedFiles(root)
    columns = choose_columns(
        path, header, rows, file_column=file_column, labels=labels, is_file=files.is_file
    )
    if not rows:
        raise DataError(f"{shown(str(path))} has a header but no rows: add a row an image")
    items = _items(files, rows, columns)
    notes = [*columns.notes, *files.notes]
    if len(columns.labels) == 1:
        names = [_filled(row, columns.labels[0]) for row in rows]
        return single_label_source(
            root,
            list(zip(items, names, strict=True)),
            None,
            notes=[*notes, *_nearly_alike(names)],
            if_one="list images of a second class",
        )
    labelled = [
        replace(item, labels=_numbers(row, columns.labels))
        for item, row in zip(items, rows, strict=True)
    ]
    return Source(
        root=root, task=MULTI_LABEL, classes=tuple(columns.labels), items=labelled, notes=notes
    )


def _items(files: ListedFiles, rows: list[Row], columns: Columns) -> list[Item]:
    """An item a row, unlabelled; each file must exist and be listed once."""
    lines: dict[str, str] = {}
    items = []
    wrong: list[str] = []
    for row in rows:
        written = _filled(row, columns.file)
        try:
            name = files.find(written)
        except DataError as error:
            wrong.append(f"{row.where} names {shown(written)}, which {error}")
            continue
        if name in lines:
            raise DataError(
                f"{row.where} lists {shown(name)} again, after {lines[name]}: list each image once"
            )
        lines[name] = row.where
        items.append(Item(name, split_of(row, columns.split), ()))
    if wrong:
        more = f" (so do {len(wrong) - 1:,} more lines)" if len(wrong) > 1 else ""
        raise DataError(f"{wrong[0]}{more}")
    return items


def _nearly_alike(names: Sequence[str]) -> list[str]:
    """A line for each two classes that differ in upper and lower case alone."""
    ways: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        ways.setdefault(name.casefold(), []).append(name)
    return [
        f"classes {' and '.join(map(repr, alike))} differ in upper and lower case only: write them"
        " alike if they are one"
        for alike in ways.values()
        if len(alike) > 1
    ][:5]


def _filled(row: Row, column: str) -> str:
    if not row.cells[column]:
        raise DataError(f"{row.where} has nothing in column `{column}`: fill it or remove the line")
    return row.cells[column]


def _numbers(row: Row, columns: list[str]) -> tuple[int, ...]:
    for column in columns:
        if row.cells[column] not in ("0", "1"):
            raise DataError(
                f"{row.where} has {row.cells[column]!r} in column {column!r}, where several label"
                " columns mean 0 or 1: write 0 or 1, or name the one label column with --labels"
            )
    return tuple(i for i, column in enumerate(columns) if row.cells[column] == "1")
