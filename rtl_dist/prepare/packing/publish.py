"""From finished shards to a data set: what their sidecars say, put together and published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError
from rtl_dist.core.text import shorten
from rtl_dist.data.format.description import PACKER_KEY
from rtl_dist.data.format.split import INDEX_DTYPE
from rtl_dist.data.storage.shard_files import Shard
from rtl_dist.prepare.conversion import cure_of
from rtl_dist.prepare.packing.plan import Plan, key_of
from rtl_dist.prepare.packing.resume import read_record
from rtl_dist.prepare.publish import IndexedSplit, LeftOutTable, index_split, publish_dataset
from rtl_dist.prepare.sources.items import LeftOut


@dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """A split whose shards are all there."""

    indexed: IndexedSplit
    """Ready to be published."""
    sources: list[tuple[str, str]]
    """(key, file) of each sample."""
    left_out: list[LeftOut]
    """Its images that could not be packed, in the order of the shards."""
    doubtful: list[str]
    """Its images that were packed with a doubt, each with the reason, in the same order."""


def gather_split(plan: Plan, out: Path, split: str) -> PackedSplit:
    """Puts together what the sidecars of a split's shards say.

    Raises:
        DataError: no image of the split can be packed; names some and why.
    """
    shards = [shard for shard in plan.shards if shard.split == split]
    records = [read_record(out, shard.path) for shard in shards]
    left_out = [LeftOut(*file) for record in records for file in record.left_out]
    if not any(record.rows for record in records):
        bad = [f"{file.name} {file.reason}" for file in left_out]
        cure = cure_of(bad)
        raise DataError(
            f"no image of split {split!r} can be packed: {shorten(bad)}{cure and f'; {cure}'}"
        )
    rows = (
        (offset, size, number, crc32, -1)
        for number, record in enumerate(records)
        for _, offset, size, crc32 in record.rows
    )
    packed = [
        (shard.first + position, shard.items[position])
        for shard, record in zip(shards, records, strict=True)
        for position, *_ in record.rows
    ]
    indexed = index_split(
        split,
        np.fromiter(rows, INDEX_DTYPE, len(packed)),
        [item.labels for _, item in packed],
        [
            Shard(
                path=record.path,
                num_samples=len(record.rows),
                bytes=record.bytes,
                sha256=record.sha256,
            )
            for record in records
        ],
        task=plan.source.task,
        num_classes=len(plan.source.classes),
        num_left_out=len(left_out),
    )
    return PackedSplit(
        indexed=indexed,
        sources=[(key_of(position, item.name), item.name) for position, item in packed],
        left_out=left_out,
        doubtful=[f"{name} {why}" for record in records for name, why in record.doubtful],
    )


def publish(plan: Plan, out: Path, splits: dict[str, PackedSplit], left_out: list[LeftOut]) -> str:
    """Writes the index, the tables and last ``dataset.json``. Returns its fingerprint."""
    settings: dict[str, Any] = {
        "shard_size": plan.options.shard_size,
        "resize": plan.options.resize,
        "val_fraction": plan.options.val_fraction,
    }
    if plan.options.convert:
        settings["convert"] = True
    return publish_dataset(
        out,
        task=plan.source.task,
        classes=plan.source.classes,
        made_by={PACKER_KEY: settings},
        splits={name: split.indexed for name, split in splits.items()},
        left_out=LeftOutTable(
            header=("file", "reason"), rows=[(file.name, file.reason) for file in left_out]
        ),
        sources={name: split.sources for name, split in splits.items()},
    )
