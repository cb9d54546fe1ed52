"""From finished shards to a data set: the index, what was left out, and last ``dataset.json``."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import shorten
from rtl_dist.data.format.dataset import (
    DESCRIPTION,
    FORMAT,
    INDEX_FOLDER,
    PACKER_KEY,
    fingerprint_of,
)
from rtl_dist.data.format.split import INDEX_DTYPE
from rtl_dist.prepare.packing.plan import Plan, ShardPlan
from rtl_dist.prepare.packing.work import ShardRecord, read_record
from rtl_dist.prepare.publish import LEFT_OUT_FILE, npy_bytes, publishing
from rtl_dist.prepare.sources.items import LeftOut


@dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """A split's entry in ``dataset.json`` and its index files by name, ready to be published."""

    entry: dict[str, Any]
    files: dict[str, bytes]
    left_out: list[LeftOut]


def gather_split(plan: Plan, out: Path, split: str) -> PackedSplit:
    """Puts together what the sidecars of a split's shards say.

    Raises:
        DataError: no image of the split can be packed; names some and why.
    """
    shards = [shard for shard in plan.shards if shard.split == split]
    records = [read_record(out, shard.path) for shard in shards]
    left_out = [LeftOut(*file) for record in records for file in record.left_out]
    num_samples = sum(len(record.rows) for record in records)
    if not num_samples:
        bad = [f"{file.name} {file.reason}" for file in left_out]
        raise DataError(f"no image of split {split!r} can be packed: {shorten(bad)}")
    num_classes = len(plan.source.classes)
    index = np.zeros(num_samples, INDEX_DTYPE)
    matrix = None
    if plan.source.task == MULTI_LABEL:
        matrix = np.zeros((num_samples, num_classes), np.uint8)
    _fill(index, matrix, shards, records)
    files = {f"{split}.npy": npy_bytes(index)}
    entry = {
        "num_samples": num_samples,
        "class_counts": (
            np.bincount(index["label"], minlength=num_classes)
            if matrix is None
            else matrix.sum(axis=0, dtype=np.int64)
        ).tolist(),
        "num_left_out": len(left_out),
        "shards": [
            {
                "path": record.path,
                "num_samples": len(record.rows),
                "bytes": record.bytes,
                "sha256": record.sha256,
            }
            for record in records
        ],
        "index_sha256": hashlib.sha256(files[f"{split}.npy"]).hexdigest(),
    }
    if matrix is not None:
        files[f"{split}.labels.npy"] = npy_bytes(matrix)
        entry["labels_sha256"] = hashlib.sha256(files[f"{split}.labels.npy"]).hexdigest()
    return PackedSplit(entry=entry, files=files, left_out=left_out)


def publish(
    plan: Plan, out: Path, splits: dict[str, PackedSplit], left_out: list[LeftOut]
) -> dict[str, Any]:
    """Writes the index, ``left_out.csv`` if there is anything to say, and last ``dataset.json``.

    Nothing in them depends on where or when the data set was packed.

    Returns:
        The description.
    """
    for split in splits.values():
        for name, content in split.files.items():
            with publishing(out, out / INDEX_FOLDER / name) as file:
                file.write(content)
    if left_out:
        table = io.StringIO(newline="")
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["file", "reason"])
        rows.writerows((entry.name, entry.reason) for entry in left_out)
        with publishing(out, out / LEFT_OUT_FILE) as file:
            file.write(table.getvalue().encode("utf-8", "surrogateescape"))
    description: dict[str, Any] = {
        "format": FORMAT,
        "task": plan.source.task,
        "classes": list(plan.source.classes),
        PACKER_KEY: {
            "shard_size": plan.options.shard_size,
            "resize": plan.options.resize,
            "val_fraction": plan.options.val_fraction,
        },
        "splits": {name: split.entry for name, split in splits.items()},
    }
    description["fingerprint"] = fingerprint_of(description)
    with publishing(out, out / DESCRIPTION) as file:
        file.write((json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())
    return description


def _fill(
    index: np.ndarray,
    matrix: np.ndarray | None,
    shards: list[ShardPlan],
    records: list[ShardRecord],
) -> None:
    """Fills ``index`` (n,) and, in multi-label data, the zeroed ``matrix`` (n, classes)."""
    row = 0
    for number, (shard, record) in enumerate(zip(shards, records, strict=True)):
        for position, offset, size, crc32 in record.rows:
            labels = shard.items[position].labels
            index[row] = (offset, size, number, crc32, labels[0] if matrix is None else -1)
            if matrix is not None:
                matrix[row, list(labels)] = 1
            row += 1
