"""A folder of class folders, with or without ``train/``, ``val/`` and ``test/`` above them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rtl_dist.core.errors import DataError
from rtl_dist.prepare.sources.items import (
    IMAGE_SUFFIXES,
    Item,
    LeftOut,
    Source,
    single_label_source,
)
from rtl_dist.prepare.splits import SPLIT_OF, SPLIT_ORDER, TRAIN

# Files that systems leave behind, besides those whose names begin with a dot.
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "lost+found"}


def read_folder(root: Path, labels: Sequence[str] | None) -> Source:
    """Classes are the names of the class folders, sorted, over all splits.

    A class folder may hold folders of its own; everything beneath it is of its class. Images that
    lie outside every class folder are left out by name; other stray files are ignored.

    Raises:
        DataError: no class folders, a split twice or empty, or a folder that is no split.
        UserError: ``labels`` names a class that is not there.
    """
    named: list[tuple[Item, str]] = []
    classes: set[str] = set()
    split_folders = _split_folders(root)
    stray_files = [] if split_folders[0][1] == root else [root / name for name in _list(root)[1]]
    for split, folder in split_folders:
        class_names, strays = _list(folder)
        stray_files += [folder / name for name in strays]
        if not class_names:
            found = "images but no class folders" if strays else "nothing to pack"
            raise DataError(
                f"{folder} holds {found}: put the images of each class into a folder named after"
                " the class, or list them in a CSV with the columns `file` and `label`"
            )
        classes.update(class_names)
        before = len(named)
        for class_name in class_names:
            for file in _files_below(folder / class_name):
                named.append((Item(_relative(file, root), split, ()), class_name))
        if len(named) == before:
            raise DataError(
                f"{folder} holds class folders but no images: put images into them"
                + (f", or remove {folder}" if len(split_folders) > 1 else "")
            )
    left_out = [
        LeftOut(_relative(file, root), "lies outside every class folder")
        for file in stray_files
        if file.name.lower().endswith(IMAGE_SUFFIXES)
    ]
    return single_label_source(root, named, sorted(classes), labels, left_out)


def _split_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder) in the order train, val, test; the root itself is train when there is none.

    Folders are splits when one is called train or when all have a split's name: a class may well be
    called ``test``.
    """
    folders, _ = _list(root)
    splits = [name for name in folders if name.lower() in SPLIT_OF]
    has_train = any(name.lower() == TRAIN for name in splits)
    if not splits or not (has_train or len(splits) == len(folders)):
        return [(TRAIN, root)]
    others = [name for name in folders if name not in splits]
    if others:
        raise DataError(
            f"{root / others[0]} is neither train, val nor test, but lies beside"
            f" {', '.join(splits)}: move it away, or pack {root / splits[0]} alone"
        )
    found: dict[str, str] = {}
    for name in splits:
        split = SPLIT_OF[name.lower()]
        if split in found:
            raise DataError(
                f"{root} has two folders for split {split!r}, {found[split]} and {name}: join them"
                " or move one away"
            )
        found[split] = name
    return [(split, root / found[split]) for split in SPLIT_ORDER if split in found]


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Names of folders, and of files, sorted and without hidden and system files."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FILES:
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(
            f"cannot list {folder}: {error.strerror}; correct its permissions"
        ) from error
    return sorted(folders), sorted(files)


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every visible file beneath, links followed; ``above`` are the real paths already entered."""
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder} is a link to a folder above itself: remove the link")
    folders, files = _list(folder)
    for name in files:
        yield folder / name
    for name in folders:
        yield from _files_below(folder / name, (*above, real))


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()
