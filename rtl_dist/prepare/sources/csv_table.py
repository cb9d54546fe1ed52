"""A table as people save them: its separator and encoding found out, and which column is what."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.text import did_you_mean, shorten, shown
from rtl_dist.prepare.sources.items import IMAGE_SUFFIXES, check_labels
from rtl_dist.prepare.splits import TRAIN, VAL, split_named

_SEPARATORS = (",", ";", "\t")
_SAID_SEPARATOR = re.compile("sep=(.)", re.IGNORECASE)  # Excel's own first line
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how Excel saves "Unicode text"

FILE, SPLIT = "file", "split"
_FILE_NAMES = (
    *("file", "filename", "filepath", "image", "imagename", "imagepath", "imagefile", "img"),
    *("imgpath", "path", "imageid", "id", "photo", "picture", "name", "input"),
)
_LABEL_NAMES = (
    *("label", "labels", "class", "classname", "category", "species", "target", "labelname"),
    *("breed", "diagnosis"),
)
_SPLIT_NAMES = ("split", "set", "subset", "partition", "phase")
_IS_VAL_NAMES = ("isvalid", "isval")
_TRUTH = {"true": VAL, "1": VAL, "yes": VAL, "false": TRAIN, "0": TRAIN, "no": TRAIN}
_ROWS_TRIED = 5
_LARGEST = 1 << 30  # bytes; some ten million images


@dataclass(frozen=True, slots=True)
class Row:
    """One line's cells by column, stripped."""

    where: str
    """File and line, for error messages."""
    cells: dict[str, str]
    """By the column's name."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column is what."""

    file: str
    """The images' paths."""
    split: str | None
    """The split's name, or whether it is val; None: all is train."""
    labels: list[str]
    """One of class names, or several of 0 and 1."""
    notes: list[str]
    """What was guessed: a line each."""


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """(the header, the rows). Commas, semicolons or tabs; UTF-8, or UTF-16 that says so.

    Raises:
        DataError: names the file, the line and the cure.
    """
    with open_table(path) as (header, rows):
        return header, list(rows)


@contextmanager
def open_table(path: Path) -> Iterator[tuple[list[str], Iterator[Row]]]:
    """As ``read_table``, the rows one at a time."""
    if path.exists() and not path.is_file():
        raise DataError(f"{shown(str(path))} is not a plain file: name a table on disk")
    with _named(path):
        if (size := path.stat().st_size) > _LARGEST:
            raise DataError(
                f"{shown(str(path))} has {size:,} bytes, and no table of images more than"
                f" {_LARGEST:,}: name the table, or pack it in parts"
            )
        with open(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in _UTF_16 else "utf-8-sig"
        lines = open(path, encoding=encoding, newline="")  # noqa: SIM115 - what follows closes it
    with lines:
        with _named(path):
            first = lines.readline()
            told = _SAID_SEPARATOR.fullmatch(first.strip())
            separator = told[1] if told else _separator(first)
            if not told:
                lines.seek(0)
            reader = csv.reader(lines, delimiter=separator, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
        repeated = next((name for name in header if name and header.count(name) > 1), None)
        if repeated is not None:
            raise DataError(
                f"{shown(str(path))} has two columns {repeated!r}: rename or remove one"
            )
        yield header, _rows(path, header, reader, lines_before=bool(told))


def _rows(path: Path, header: list[str], reader: Any, *, lines_before: int) -> Iterator[Row]:
    with _named(path):
        for cells in reader:
            where = f"{shown(str(path))} line {reader.line_num + lines_before}"
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where} has {len(cells)} cells where the header has {len(header)}: give it"
                    " one cell a column (quote a cell that holds a comma)"
                )
            yield Row(where, {k: v.strip() for k, v in zip(header, cells, strict=True)})


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(
            f"cannot read {shown(str(path))}: {error}; save it as a CSV in UTF-8"
        ) from error


def _separator(header: str) -> str:
    """The one that makes most columns of the first line; a comma if none makes any."""
    cells = {one: len(next(csv.reader([header], delimiter=one), [])) for one in _SEPARATORS}
    return max(_SEPARATORS, key=lambda one: cells[one])


def choose_columns(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Row],
    *,
    file_column: str | None,
    labels: Sequence[str] | None,
    is_file: Callable[[str], bool],
) -> Columns:
    """Which column is what: as told, else by the names that are ours (``file``, ``split``), else by
    what is in them.

    Args:
        file_column: as told; None: to be found.
        labels: the label columns, as told; None: to be found.
        is_file: whether a cell is the path of a file.

    Raises:
        DataError: it cannot be known.
        UserError: a column that was told is not there.
    """
    notes: list[str] = []
    named = [name for name in header if name and not name.startswith("Unnamed:")]
    file = file_column_of(path, named, rows, file_column, is_file)
    if file != FILE and file_column is None:
        notes.append(f"column {file!r} of {path.name} is taken for the images' files")
    split = _split_column([name for name in named if name != file], rows)
    if split is not None and split != SPLIT:
        notes.append(f"column {split!r} of {path.name} is taken for the split")
    others = [name for name in named if name not in (file, split)]
    if labels is not None:
        return Columns(file=file, split=split, labels=_told(labels, others), notes=notes)
    if not others:
        raise DataError(f"{shown(str(path))} has no label column: add one, or a 0/1 column a class")
    if len(others) > 1 and not all(
        row.cells[name] in ("0", "1") for row in rows for name in others
    ):
        guessed = [name for name in others if _plain(name) in _LABEL_NAMES]
        if len(guessed) == 1:
            unread = [name for name in others if name not in guessed]
            notes.append(
                f"column {guessed[0]!r} of {path.name} is taken for the label, {shorten(unread)}"
                f" {'is' if len(unread) == 1 else 'are'} not read (--labels says otherwise)"
            )
            others = guessed
    return Columns(file=file, split=split, labels=others, notes=notes)


def split_of(row: Row, column: str | None) -> str:
    """Raises DataError: its cell names no split."""
    if column is None:
        return TRAIN
    value = row.cells[column]
    split = split_named(value)
    if split is None and _plain(column) in _IS_VAL_NAMES:
        split = _TRUTH.get(value.lower())
    if split is None:
        raise DataError(f"{row.where} has {value!r} in column `{column}`: write train, val or test")
    return split


def file_column_of(
    path: Path,
    named: Sequence[str],
    rows: Sequence[Row],
    told: str | None,
    is_file: Callable[[str], bool],
) -> str:
    if told is not None:
        if told not in named:
            hint = did_you_mean(told, named, "{!r}") or f"; there are: {shorten(list(named))}"
            raise UserError(f"--file-column names {told!r}, no column of {path.name}{hint}")
        return told
    if FILE in named:
        return FILE
    known = [name for name in named if _plain(name) in _FILE_NAMES]
    tried = rows[:_ROWS_TRIED]
    right = [name for name in named if tried and all(is_file(r.cells[name]) for r in tried)]
    # files may be without their folder: they are looked for when the column is known
    like = [name for name in named if tried and all(_is_image_name(r.cells[name]) for r in tried)]
    ways = [[name for name in some if name in known] for some in (right, like)]
    for found in (right, ways[0], like, ways[1], known):
        if len(found) == 1:
            return found[0]
    several = right or like or known
    what = f"; {shorten(several)} may all be it" if several else ""
    raise DataError(
        f"{shown(str(path))} has no column `{FILE}` (its first line holds:"
        f" {shorten(list(named)) or 'nothing'}){what}: name the column of image paths `{FILE}`, or"
        " say which it is with --file-column, and separate columns by commas"
    )


def _is_image_name(cell: str) -> bool:
    return cell.lower().endswith(IMAGE_SUFFIXES)


def _split_column(named: Sequence[str], rows: Sequence[Row]) -> str | None:
    if SPLIT in named:
        return SPLIT
    for name in named:
        values = {row.cells[name] for row in rows}
        if _plain(name) in _SPLIT_NAMES and all(map(split_named, values)):
            return name
        if _plain(name) in _IS_VAL_NAMES and all(value.lower() in _TRUTH for value in values):
            return name
    return None


def _told(labels: Sequence[str], others: Sequence[str]) -> list[str]:
    return list(check_labels(labels, others, "label column"))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())
