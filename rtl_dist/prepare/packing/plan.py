"""What goes where: which items become val, the shuffled order, the shards, all known beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import PIL

from rtl_dist.core.errors import UserError
from rtl_dist.data.format.dataset import DESCRIPTION, FORMAT, INDEX_FOLDER
from rtl_dist.prepare.holdout import with_val
from rtl_dist.prepare.publish import LEFT_OUT_FILE
from rtl_dist.prepare.sources.items import Item, Source
from rtl_dist.prepare.splits import scatter_key

# Raised when the same options would give other bytes than before, so that old work is not reused.
_PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What decides the bytes. ``resize``: short side in pixels; ``shard_size``: samples."""

    val_fraction: float = 0.0
    shard_size: int = 1000
    resize: int | None = None
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}: give 0 or more, less than 1")
        if self.shard_size < 1:
            raise UserError(f"--shard-size is {self.shard_size}: give 1 sample or more")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize is {self.resize}: give a short side of 1 pixel or more")
        if self.labels is not None and not self.labels:
            raise UserError("--labels names nothing: name a label or leave it out")


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard: its place, and the items it holds, in order.

    ``path`` is relative to the data set. ``first`` is the first item's position in its split.
    """

    split: str
    path: str
    first: int
    items: list[Item]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole pack. ``digest`` is equal when source and options are, wherever they are."""

    source: Source
    options: PackOptions
    shards: list[ShardPlan]
    source_bytes: int
    digest: str

    @property
    def files(self) -> list[str]:
        """All that the pack may write into OUT besides its work folder, relative paths."""
        names = [DESCRIPTION, LEFT_OUT_FILE, *(shard.path for shard in self.shards)]
        for split in self.source.splits:
            names += [f"{INDEX_FOLDER}/{split}.npy", f"{INDEX_FOLDER}/{split}.labels.npy"]
        return names


def make_plan(source: Source, options: PackOptions) -> Plan:
    """Decides everything but which images turn out to be broken.

    Raises:
        UserError: ``val_fraction`` was given for a source that has a val split, or no train split.
    """
    if options.val_fraction:
        source = replace(source, items=with_val(source, options.val_fraction))
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


def _shuffled(split: str, items: Sequence[Item]) -> list[Item]:
    """A fixed pseudo-random order: class-sorted sources must come out mixed."""
    return sorted(items, key=lambda item: scatter_key(f"order {split}", item.name))
