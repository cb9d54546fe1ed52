"""What every source of images is turned into: named, labelled items, each in a split."""

from __future__ import annotations

import os
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.core.text import did_you_mean, is_showable, shorten
from rtl_dist.prepare.class_names import in_order, one_spelling
from rtl_dist.prepare.splits import SPLIT_ORDER

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp"),
    *(".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"),  # to be converted
)


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
    notes: list[str] = field(default_factory=list)
    """What was guessed or passed over: a line each, to be said."""
    if_one: str = ""
    """What to do about it where there is one class only; empty: nothing particular."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have items, as train, val, test."""
        present = {item.split for item in self.items}
        return tuple(split for split in SPLIT_ORDER if split in present)


def single_label_source(
    root: Path,
    named: list[tuple[Item, str]],
    labels: Sequence[str] | None,
    *,
    classes: Sequence[str] | None = None,
    left_out: Sequence[LeftOut] = (),
    notes: Sequence[str] = (),
    if_one: str = "",
) -> Source:
    """Numbers the classes: all of them in order, or only ``labels`` in theirs.

    Args:
        named: each item with its class's name; the items' own labels are not looked at.
        classes: all names in order; None: those of ``named``, numbers by value and else as text.
        if_one: what to do about it where there is one class only.

    Raises:
        UserError: ``labels`` names a class that is not there, or one twice.
        DataError: a class's name is not text.
    """
    spelling = one_spelling(dict.fromkeys(name for _, name in named))
    known = in_order(set(spelling.values())) if classes is None else tuple(classes)
    for name in known:
        if not is_showable(name):  # also what is not UTF-8 on disk: it fits no dataset.json
            raise DataError(f"class name {name!r} holds characters that cannot be shown: rename it")
    kept = known if labels is None else check_labels(labels, known, "class")
    number = {name: (i,) for i, name in enumerate(kept)}
    items = [
        Item(name=item.name, split=item.split, labels=number[spelling[name]], content=item.content)
        for item, name in named
        if spelling[name] in number
    ]
    return Source(
        root=root,
        task=SINGLE_LABEL,
        classes=kept,
        items=items,
        left_out=sorted(left_out),
        notes=list(notes),
        if_one=if_one,
    )


def check_labels(labels: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """``labels`` as ``known`` spells them. Raises UserError: one is unknown or is given twice."""
    spelling = {unicodedata.normalize("NFC", name): name for name in known}
    labels = [spelling.get(unicodedata.normalize("NFC", label), label) for label in labels]
    for label in labels:
        if label not in known:
            hint = did_you_mean(label, known, "{!r}") or f"; there are: {shorten(known)}"
            raise UserError(f"--labels names {label!r}, which is no {what} of the source{hint}")
        if list(labels).count(label) > 1:
            raise UserError(f"--labels names {label!r} twice; name each {what} once")
    return tuple(labels)
