"""Which folders of a source are splits, and what to do where there is only one class."""

from __future__ import annotations

from pathlib import Path

from rtl_dist.core.errors import DataError
from rtl_dist.core.text import shorten, shown
from rtl_dist.prepare.sources.walk import list_folder
from rtl_dist.prepare.splits import SPLIT_ORDER, TRAIN, splits_named

TABLES = (".csv", ".tsv")
_DEEPEST = 20


def split_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder) in the order train, val, test; the root itself is train when there is none.

    Folders are splits when all have a split's name, or when one is called train and holds folders:
    a class may well be called ``test``, and one of vehicles ``train``.

    Raises:
        DataError: some are and some are not, two are the same, or it cannot be known.
    """
    names = list_folder(root).folders
    named = splits_named(names)
    with_folders = {name for name in named if list_folder(root / name).folders}
    has_train = any(named[name] == TRAIN for name in with_folders)
    if not named or not (has_train or len(named) == len(names)):
        _refuse_doubtful(root, names, with_folders)
        return [(TRAIN, root)]
    others = [name for name in names if name not in named]
    if others:
        raise DataError(
            f"{shown(str(root / others[0]))} is neither train, val nor test, but lies beside"
            f" {shorten(list(named))}: move it away, or pack"
            f" {shown(str(root / next(iter(named))))} alone"
        )
    found: dict[str, str] = {}
    for name, split in named.items():
        if split in found:
            raise DataError(
                f"{shown(str(root))} has two folders for split {split!r}, {shown(found[split])} and"
                f" {shown(name)}: join them or move one away"
            )
        found[split] = name
    return [(split, root / found[split]) for split in SPLIT_ORDER if split in found]


def _refuse_doubtful(root: Path, names: list[str], like_splits: set[str]) -> None:
    """Raises DataError: a folder is called like a split and holds the folders that its neighbour
    holds, so both seem to hold the same classes."""
    below = {name: set(list_folder(root / name).folders) for name in names} if like_splits else {}
    for name in sorted(like_splits):
        for other in names:
            if other != name and (same := below[name] & below[other]):
                raise DataError(
                    f"{shown(str(root))} holds {shown(name)}, called like a split, beside"
                    f" {shown(other)}, and both hold {shorten(sorted(same))}: if these are the"
                    " classes, call the folders train, val and test; else rename"
                    f" {shown(name)}"
                )


def refuse_splits_below(folder: Path, classes: list[str]) -> None:
    """Raises DataError: class folders hold folders called like splits, whose images would be mixed
    again."""
    for name in classes:
        below = list_folder(folder / name).folders if (folder / name).is_dir() else []
        splits = {split: one for one, split in splits_named(below).items()}
        if TRAIN in splits and len(splits) > 1:
            inner, outer = splits[TRAIN], shown(name)
            raise DataError(
                f"{shown(str(folder / name))} holds {shorten(list(splits.values()))}, called like"
                f" splits, which would all be of class {outer!r} and of one split: put the classes"
                f" into the splits, as in {shown(inner)}/{outer}"
            )


def split_note(splits: list[tuple[str, Path]], root: Path) -> list[str]:
    """Which folder is taken for which split, where their names do not say so themselves."""
    if splits[0][1] == root or all(folder.name == split for split, folder in splits):
        return []
    return ["splits: " + ", ".join(f"{shown(folder.name)} is {split}" for split, folder in splits)]


def nested_note(folder: Path, classes: list[str]) -> list[str]:
    """Says so where every class folder holds the same folders, which may be the classes meant."""
    same: set[str] | None = None
    for name in classes:
        listing = list_folder(folder / name) if (folder / name).is_dir() else None
        if listing is None or listing.files:
            return []
        same = set(listing.folders) if same is None else same & set(listing.folders)
    if same is None or len(same) < 2:
        return []
    return [
        f"every class folder of {shown(str(folder))} holds the folders {shorten(sorted(same))}: if"
        " these are the classes, put each one's images together"
    ]


def table_note(root: Path, tables: list[str]) -> list[str]:
    """Names the tables that were seen and not read."""
    if not tables:
        return []
    first = shown(str(root / tables[0]))
    return [f"not read: {shorten(tables)}; to pack by a table, name it: rtl-dist pack {first} OUT"]


def tables_in(folder: Path) -> list[str]:
    """Names of the files that may list images."""
    return [name for name in list_folder(folder).files if name.lower().endswith(TABLES)]


def cure_of_one_class(folder: Path, only: str, tables: list[str]) -> str:
    """What to do where ``folder`` holds the one class folder ``only``."""
    if tables:
        return (
            "if a table lists the labels, pack the table:"
            f" rtl-dist pack {shown(str(folder / tables[0]))} OUT"
        )
    inner = folder / only
    for _ in range(_DEEPEST):
        below = list_folder(inner)
        if len(below.folders) > 1:
            return f"pack {shown(str(inner))}, which holds the folders {shorten(below.folders)}"
        if not below.folders:
            break
        inner /= below.folders[0]
    return f"put the images of a second class into a folder beside {shown(str(folder / only))}"
