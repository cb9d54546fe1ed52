"""From scans and labels to a data set: where it may be written, and what is said of each split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.files import read_object
from rtl_dist.core.regular_files import open_regular
from rtl_dist.core.urls import is_url
from rtl_dist.data.format.description import DESCRIPTION, INDEXER_KEY, PACKER_KEY
from rtl_dist.data.storage.shard_files import Shard
from rtl_dist.prepare.indexing.inputs import InputShard
from rtl_dist.prepare.indexing.merge import Labelling, LeftOutSample
from rtl_dist.prepare.indexing.scan import ShardScan
from rtl_dist.prepare.publish import (
    LEFT_OUT_FILE,
    IndexedSplit,
    LeftOutTable,
    index_split,
    publish_dataset,
    published_files,
)
from rtl_dist.prepare.splits import SPLIT_ORDER
from rtl_dist.prepare.work_folder import PLAN_FILE, WORK_FOLDER, locked

_LEFT_OUT = ("shard", "key", "reason")  # the columns of its table


def check_place(out: Path, overwrite: bool) -> list[Path]:
    """The files of the described data set that an index written into OUT replaces, no shards.

    Raises:
        UserError: OUT is a file, holds another data set, or is being packed.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: the last argument, OUT, must be a folder")
    description = out / DESCRIPTION
    if not description.exists():
        if (out / WORK_FOLDER / PLAN_FILE).exists():
            raise UserError(f"{out} holds an unfinished pack: finish it, or choose another OUT")
        _require_our_table(out / LEFT_OUT_FILE)
        return []
    if not overwrite:
        raise UserError(
            f"{out} already holds a data set: choose another OUT, or replace its description and"
            " index with --overwrite (shards are never touched)"
        )
    content = read_object(description)
    try:
        ours = INDEXER_KEY in content or PACKER_KEY in content
        names = [name for name in content["splits"] if Path(name).name == name]
    except (KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{description} was not written by rtl-dist, so it is not replaced: choose another OUT,"
            " or move the file away yourself"
        )
    return [out / name for name in published_files(names)]


def _require_our_table(table: Path) -> None:
    """Of an index that was killed before it wrote its description, or not there."""
    if not os.path.lexists(table):
        return
    header = ",".join(_LEFT_OUT).encode()
    try:
        with open_regular(table) as file:
            ours = file.readline(len(header) + 1).rstrip() == header
    except OSError:
        ours = False
    if not ours:
        raise UserError(
            f"{table} was not written by rtl-dist, so it is not replaced: choose another OUT, or"
            " move the file away yourself"
        )


def shard_path(location: str, out: Path) -> str:
    """A shard as ``dataset.json`` names it: relative where it may move together with OUT.

    Raises:
        DataError: the path is no text that can be written down.
    """
    if is_url(location):
        return location
    # The folder's links are followed, as opening ``OUT/../x`` follows OUT's; a shard that is
    # itself a link keeps its name.
    path = Path(location).parent.resolve() / Path(location).name
    base = out.resolve()
    together = base.parent in path.parents
    name = Path(os.path.relpath(path, base) if together else path).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the name of shard {name!r} is not UTF-8, which dataset.json must be: rename it"
        ) from None
    return name


def describe_splits(
    out: Path,
    inputs: Sequence[InputShard],
    scans: Sequence[ShardScan],
    found: Labelling,
    sample_splits: list[list[str]],
    num_left_out: dict[str, int],
) -> dict[str, IndexedSplit]:
    """Every split that has shards or samples, ready to be published.

    Args:
        sample_splits: the split of each sample of each shard, since two splits may share shards.
        num_left_out: samples left out, by split.
    """
    described = {}
    for split in SPLIT_ORDER:
        numbers = [
            number
            for number, shard in enumerate(inputs)
            if shard.split == split or split in sample_splits[number]
        ]
        if numbers:
            described[split] = _describe_split(
                split, out, numbers, scans, found, sample_splits, num_left_out.get(split, 0)
            )
    return described


def _describe_split(
    split: str,
    out: Path,
    numbers: Sequence[int],
    scans: Sequence[ShardScan],
    found: Labelling,
    sample_splits: list[list[str]],
    num_left_out: int,
) -> IndexedSplit:
    """``numbers`` are the split's shards among ``scans``, in order."""
    shards = []
    rows = []
    labels: list[tuple[int, ...]] = []
    for number, shard in enumerate(numbers):
        scan = scans[shard]
        its = [i for i, name in enumerate(sample_splits[shard]) if name == split]
        its_rows = scan.rows[its]
        its_rows["shard"] = number
        rows.append(its_rows)
        labels += [found.labels[shard][i] for i in its]
        shards.append(
            Shard(
                path=shard_path(scan.location, out),
                num_samples=len(its),
                bytes=scan.bytes,
                sha256=scan.sha256,
            )
        )
    return index_split(
        split,
        np.concatenate(rows),
        labels,
        shards,
        task=found.task,
        num_classes=len(found.classes),
        num_left_out=num_left_out,
    )


def publish(
    out: Path,
    found: Labelling,
    settings: dict[str, Any],
    splits: dict[str, IndexedSplit],
    left_out: Sequence[LeftOutSample],
    overwrite: bool,
) -> str:
    """Writes everything into OUT, ``dataset.json`` last. Returns its fingerprint.

    Args:
        settings: what was asked for, beside where labels were found.

    Raises:
        UserError: OUT cannot be written, or holds another data set by now.
        OSError: the disk fails.
    """
    where = {"version": 1, "image": found.image, "label": found.label, "field": found.field}
    with locked(out):
        for old in check_place(out, overwrite):
            old.unlink(missing_ok=True)
        return publish_dataset(
            out,
            task=found.task,
            classes=found.classes,
            made_by={INDEXER_KEY: where | settings},
            splits=splits,
            left_out=LeftOutTable(
                header=_LEFT_OUT,
                rows=[(shard_path(one.shard, out), one.key, one.reason) for one in left_out],
            ),
        )
