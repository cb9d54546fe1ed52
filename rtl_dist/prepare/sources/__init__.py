"""SOURCE of ``rtl-dist pack``, whatever it is, as a list of labelled items.

``folder`` reads class folders, ``csv_file`` tables, ``digits`` scikit-learn's digits and ``public``
torchvision's data sets; ``items`` is what they all return.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtl_dist.core.errors import UserError
from rtl_dist.prepare.sources.csv_file import csv_files_in, read_csv, read_csv_folder
from rtl_dist.prepare.sources.digits import read_digits
from rtl_dist.prepare.sources.folder import read_folder
from rtl_dist.prepare.sources.items import Item, LeftOut, Source
from rtl_dist.prepare.sources.layout import TABLES
from rtl_dist.prepare.sources.public import read_public

DIGITS = "digits"
PUBLIC = "torchvision:"

__all__ = ["DIGITS", "PUBLIC", "Item", "LeftOut", "Source", "is_path", "open_source"]


def is_path(source: str) -> bool:
    """Whether SOURCE names something on disk, not a data set by its name.

    A folder called ``digits`` in the current folder is not meant; write ``./digits`` for it.
    """
    return source != DIGITS and not source.startswith(PUBLIC)


def open_source(
    source: str,
    labels: Sequence[str] | None = None,
    file_column: str | None = None,
    convert: bool = False,
) -> Source:
    """Lists what SOURCE holds; no image is read yet (but a public data set is downloaded).

    Args:
        labels: a CSV's label columns; otherwise the classes to keep, in that order.
        file_column: a CSV's column of the images' paths; None: it is found.
        convert: whether files of other formats will be converted, so that they are images too.

    Raises:
        UserError: SOURCE is not there or is no source, or ``labels`` do not fit it.
        DataError: what it holds cannot be understood; the message names the file and the cure.
    """
    if not is_path(source):
        _check_no_column(file_column)
    if source == DIGITS:
        return read_digits(labels)
    if source.startswith(PUBLIC):
        return read_public(source.removeprefix(PUBLIC), labels)
    path = Path(source)
    if path.is_dir():
        tables = csv_files_in(path)
        if tables:
            return read_csv_folder(path, tables, labels, file_column)
        _check_no_column(file_column)
        return read_folder(path, labels, convert=convert)
    if not path.exists():
        raise UserError(
            f"no source at {source}: give a folder of class folders, a .csv file, {DIGITS!r} or"
            f" '{PUBLIC}NAME'"
        )
    if not path.name.lower().endswith(TABLES):
        raise UserError(
            f"{source} is a file but no .csv: give a folder of class folders or a CSV with a `file`"
            " column"
        )
    return read_csv(path, labels, file_column)


def _check_no_column(file_column: str | None) -> None:
    if file_column is not None:
        raise UserError("--file-column was given, but SOURCE is no table: leave the option out")
