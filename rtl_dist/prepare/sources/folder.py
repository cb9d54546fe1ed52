"""A folder of class folders, with or without ``train/``, ``val/`` and ``test/`` above them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtl_dist.core.errors import DataError
from rtl_dist.core.text import shorten, shown
from rtl_dist.data.images.foreign import suffix_of
from rtl_dist.prepare.conversion import convertible, cure_of
from rtl_dist.prepare.sources.items import (
    IMAGE_SUFFIXES,
    Item,
    LeftOut,
    Source,
    single_label_source,
)
from rtl_dist.prepare.sources.layout import (
    cure_of_one_class,
    nested_note,
    refuse_splits_below,
    split_folders,
    split_note,
    table_note,
    tables_in,
)
from rtl_dist.prepare.sources.walk import list_folder, walk

_MOST = 5  # reasons a class folder, where there is no image at all


def read_folder(root: Path, labels: Sequence[str] | None, *, convert: bool = False) -> Source:
    """Classes are the names of the class folders, over all splits, in the order of ``in_order``.

    A class folder may hold folders of its own; everything beneath it is of its class. Folders that
    hold no image in any split are no classes. They, images that lie outside every class folder, and
    what is no file are left out by name; other stray files are ignored.

    Raises:
        DataError: no class folders or only one, a split twice or empty, or a folder that is no
            split.
        UserError: ``labels`` names a class that is not there.
    """
    splits = split_folders(root)
    tables = tables_in(root)
    left_out = [] if splits[0][1] == root else _strays(root, root)
    found: dict[str, list[tuple[str, Path]]] = {}  # (split, file) by class
    with_images: set[str] = set()
    for split, folder in splits:
        strays = _strays(folder, root)
        left_out += strays
        if folder != root:
            tables += [f"{folder.name}/{name}" for name in tables_in(folder)]
        class_names = list_folder(folder).folders
        if not class_names:
            raise _no_classes(root, folder, tables, bool(strays or list_folder(folder).files))
        reasons: list[str] = []
        has_images = False
        for name in class_names:
            walked = walk(folder / name, root)
            left_out += [LeftOut(_relative(path, root), what) for path, what in walked.odd]
            found.setdefault(name, []).extend((split, file) for file in walked.files)
            if any(_may_be_image(file, convert) for file in walked.files):
                with_images.add(name)
                has_images = True
            elif not has_images:
                reasons += [f"{_relative(f, root)} {_reason(f)}" for f in walked.files[:_MOST]]
        if not has_images:
            raise _no_images(folder, split, reasons, len(splits) > 1)
    for name in found.keys() - with_images:
        left_out += [
            LeftOut(_relative(folder / name, root), "is a class folder without images")
            for _, folder in splits
            if (folder / name).is_dir()
        ]
        left_out += [LeftOut(_relative(file, root), _reason(file)) for _, file in found[name]]
    named = [
        (Item(_relative(file, root), split, ()), name)
        for name in found
        if name in with_images
        for split, file in found[name]
    ]
    classes = sorted(with_images)
    refuse_splits_below(splits[0][1], classes)
    return single_label_source(
        root,
        named,
        labels,
        left_out=left_out,
        notes=[
            *split_note(splits, root),
            *nested_note(splits[0][1], classes),
            *table_note(root, tables),
        ],
        if_one=cure_of_one_class(splits[0][1], classes[0], tables) if len(classes) == 1 else "",
    )


def _no_images(folder: Path, split: str, reasons: list[str], one_of_many: bool) -> DataError:
    if reasons:
        cure = cure_of(reasons)
        return DataError(
            f"no image of split {split!r} can be packed: {shorten(reasons)}{cure and f'; {cure}'}"
        )
    return DataError(
        f"{shown(str(folder))} holds class folders but no images: put images into them"
        + (f", or remove {shown(str(folder))}" if one_of_many else "")
    )


def _no_classes(root: Path, folder: Path, tables: list[str], has_files: bool) -> DataError:
    found = "images but no class folders" if has_files else "nothing to pack"
    if tables:
        return DataError(
            f"{shown(str(folder))} holds {found}, and tables: pack a table by its path, rtl-dist"
            f" pack {shown(str(root / tables[0]))} OUT"
        )
    return DataError(
        f"{shown(str(folder))} holds {found}: put the images of each class into a folder named"
        " after the class, or list them in a CSV with the columns `file` and `label`"
    )


def _strays(folder: Path, root: Path) -> list[LeftOut]:
    """What lies beside the class folders and looks like an image, or is no file."""
    listing = list_folder(folder)
    images = [name for name in listing.files if name.lower().endswith(IMAGE_SUFFIXES)]
    found = [(name, "lies outside every class folder") for name in images] + listing.odd
    return [LeftOut(_relative(folder / name, root), why) for name, why in found]


def _may_be_image(file: Path, convert: bool) -> bool:
    reason = _reason(file)
    return not reason or (convert and convertible(reason) is not None)


def _reason(file: Path) -> str:
    """Why a file cannot be an image, by its first bytes; empty: it may be one."""
    try:
        with open(file, "rb") as opened:
            suffix_of(opened.read(16))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except DataError as error:
        return str(error)
    return ""


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()
