"""What goes where: which items become val, the shuffled order, the shards, all known beforehand."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import PIL

from rtl_dist.core.errors import UserError
from rtl_dist.data.format.description import FORMAT
from rtl_dist.prepare.holdout import check_val_fraction, held_out
from rtl_dist.prepare.publish import published_files
from rtl_dist.prepare.sources.items import Item, Source
from rtl_dist.prepare.splits import TRAIN, VAL, scatter_key

_MAX_KEY = 80

# Raised when the same options would give other bytes than before, so that old work is not reused.
_PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What decides the bytes, beside the source.

    Raises:
        UserError: a value that makes no sense.
    """

    val_fraction: float = 0.0
    """The part of train, of each class alike, that becomes val; 0: none."""
    shard_size: int = 1000
    """Samples a shard; the last of a split may have fewer."""
    resize: int | None = None
    """Pixels: images whose short side has more are shrunk to it. None: files stay as they are."""
    labels: tuple[str, ...] | None = None
    """A CSV's label columns, or the classes to keep, in that order. None: all there are."""

    convert: bool = False
    """Whether images of other formats become PNGs and JPEGs, instead of being left out."""

    def __post_init__(self) -> None:
        check_val_fraction(self.val_fraction)
        if self.shard_size < 1:
            raise UserError(f"--shard-size is {self.shard_size}: give 1 sample or more")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize is {self.resize}: give a short side of 1 pixel or more")
        if self.labels is not None and not self.labels:
            raise UserError("--labels names nothing: name a label or leave it out")


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard that is to be written."""

    split: str
    """The split it is of."""
    path: str
    """Where it goes, relative to the data set."""
    first: int
    """The first item's position in its split."""
    items: list[Item]
    """What it holds, in order, unless an item turns out to be broken."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole pack."""

    source: Source
    """With val held out of train, if that was asked for."""
    options: PackOptions
    """What was asked for."""
    shards: list[ShardPlan]
    """In the order of the splits and within them."""
    source_bytes: int
    """Of all images, before any is shrunk."""
    digest: str
    """Equal when source and options are, wherever they are: a sha256 in hexadecimal."""

    @property
    def files(self) -> list[str]:
        """All that the pack may write into OUT besides its work folder, relative paths."""
        return [*published_files(self.source.splits), *(shard.path for shard in self.shards)]


def make_plan(source: Source, options: PackOptions) -> Plan:
    """Decides everything but which images turn out to be broken.

    Raises:
        UserError: ``val_fraction`` was given for a source that has a val split, or no train split.
    """
    if options.val_fraction:
        source = replace(source, items=_with_val(source, options.val_fraction))
    digest = hashlib.sha256()
    settings = {
        "version": _PLAN_VERSION,
        "format": FORMAT,
        "task": source.task,
        "classes": source.classes,
        "shard_size": options.shard_size,
        "resize": options.resize,
        # another Pillow may encode the same pixels into other bytes
        "pillow": PIL.__version__,
        "left_out": [(file.name, file.reason) for file in source.left_out],
    }
    if options.convert:  # not there otherwise, so that packs begun before it go on
        settings["convert"] = True
    digest.update(json.dumps(settings).encode())
    shards = []
    source_bytes = 0
    for split in source.splits:
        items = _shuffled(split, [item for item in source.items if item.split == split])
        for number, first in enumerate(range(0, len(items), options.shard_size)):
            path = f"{split}/{split}-{number:06d}.tar"
            its_items = items[first : first + options.shard_size]
            shards.append(ShardPlan(split=split, path=path, first=first, items=its_items))
        for item in items:
            stamp = item.stamp(source.root)
            source_bytes += max(0, stamp[0])
            digest.update(json.dumps([item.name, split, item.labels, stamp]).encode())
    return Plan(
        source=source,
        options=options,
        shards=shards,
        source_bytes=source_bytes,
        digest=digest.hexdigest(),
    )


def key_of(position: int, name: str) -> str:
    """A sample's key: its position in the split, and the file's stem so that it can be traced.

    Webdataset ends a key at its first dot, so none may be in it.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(name).stem)
    return f"{position:07d}_{stem}"[:_MAX_KEY]


def _with_val(source: Source, fraction: float) -> list[Item]:
    """The items with a part of train made val."""
    if VAL in source.splits:
        raise UserError(
            "--val-fraction was given, but the source already has a val split: leave the option"
            " out, or move the source's val images into train"
        )
    train = {item.name: item.labels for item in source.items if item.split == TRAIN}
    if not train:
        raise UserError("--val-fraction was given, but the source has no train split to take from")
    chosen = held_out(train, source.task, fraction)
    return [
        replace(item, split=VAL) if item.split == TRAIN and item.name in chosen else item
        for item in source.items
    ]


def _shuffled(split: str, items: Sequence[Item]) -> list[Item]:
    """A fixed pseudo-random order: class-sorted sources must come out mixed."""
    return sorted(items, key=lambda item: scatter_key(f"order {split}", item.name))
