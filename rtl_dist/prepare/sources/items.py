"""What every source of images is turned into: named, labelled items, each in a split."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.core.text import did_you_mean, shorten
from rtl_dist.prepare.splits import SPLIT_ORDER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic")


@dataclass(frozen=True, slots=True)
class Item:
    """One image to pack."""

    name: str
    """Unique within its source, with forward slashes and no leading one: the file's path relative
    to ``Source.root``, unless ``content`` holds the image itself."""
    split: str
    """``train``, ``val`` or ``test``."""
    labels: tuple[int, ...]
    """Class numbers: exactly one in single-label data, any number in multi-label data."""
    content: bytes | np.ndarray | None = None
    """An image file's bytes, or uint8 pixels (height, width) or (height, width, 3), which become a
    PNG. None: the image is in the file ``name``."""

    def read(self, root: Path) -> bytes | np.ndarray:
        """The image file's bytes, or its pixels. Raises OSError when the file is unreadable."""
        return (root / self.name).read_bytes() if self.content is None else self.content

    def stamp(self, root: Path) -> tuple[int, int]:
        """Changes when the image changes: (size in bytes, mtime in ns), or (size, crc32)."""
        if self.content is None:
            try:
                status = os.stat(root / self.name)
            except OSError:  # a broken link: it will be left out by name when it is read
                return (-1, 0)
            return (status.st_size, status.st_mtime_ns)
        content = self.content if isinstance(self.content, bytes) else self.content.tobytes()
        return (len(content), zlib.crc32(content))


@dataclass(frozen=True, slots=True, order=True)
class LeftOut:
    """A file that is not packed, and why."""

    name: str
    """As ``Item.name``."""
    reason: str
    """To be put behind the name."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything to be packed."""

    root: Path
    """What the names of the items' files are relative to."""
    task: str
    """``single_label`` or ``multi_label``."""
    classes: tuple[str, ...]
    """Their names, in the order of their numbers."""
    items: list[Item]
    """In no order."""
    left_out: list[LeftOut] = field(default_factory=list)
    """What is known beforehand not to be packed, sorted by name."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have items, as train, val, test."""
        present = {item.split for item in self.items}
        return tuple(split for split in SPLIT_ORDER if split in present)


def single_label_source(
    root: Path,
    named: list[tuple[Item, str]],
    classes: Sequence[str],
    labels: Sequence[str] | None,
    left_out: Sequence[LeftOut] = (),
) -> Source:
    """Numbers the classes: all of ``classes`` in their order, or only ``labels`` in theirs.

    ``named`` pairs each item with its class's name; the items' own labels are not looked at.

    Raises:
        UserError: ``labels`` names a class that is not there, or one twice.
        DataError: a class's name is not text.
    """
    for name in classes:
        if not name.isprintable():  # also what is not UTF-8 on disk: it fits no dataset.json
            raise DataError(f"class name {name!r} holds characters that cannot be shown: rename it")
    kept = tuple(classes) if labels is None else check_labels(labels, classes, "class")
    number = {name: (i,) for i, name in enumerate(kept)}
    items = [
        Item(name=item.name, split=item.split, labels=number[name], content=item.content)
        for item, name in named
        if name in number
    ]
    return Source(
        root=root, task=SINGLE_LABEL, classes=kept, items=items, left_out=sorted(left_out)
    )


def check_labels(labels: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """``labels`` as a tuple. Raises UserError: one of them is unknown or is given twice."""
    for label in labels:
        if label not in known:
            hint = did_you_mean(label, known, "{!r}") or f"; there are: {shorten(known)}"
            raise UserError(f"--labels names {label!r}, which is no {what} of the source{hint}")
        if list(labels).count(label) > 1:
            raise UserError(f"--labels names {label!r} twice; name each {what} once")
    return tuple(labels)
