"""From scans and labels to a data set: the index, ``left_out.csv`` and last ``dataset.json``."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.urls import is_url
from rtl_dist.data.format.dataset import (
    DESCRIPTION,
    FORMAT,
    INDEX_FOLDER,
    INDEXER_KEY,
    PACKER_KEY,
    fingerprint_of,
)
from rtl_dist.prepare.indexing.merge import Labelling, LeftOutSample
from rtl_dist.prepare.indexing.scan import ShardScan
from rtl_dist.prepare.publish import LEFT_OUT_FILE, WORK_FOLDER, locked, npy_bytes, publishing


def check_place(out: Path, overwrite: bool) -> list[Path]:
    """The files of the described data set that an index written into OUT replaces, no shards.

    Raises:
        UserError: OUT is a file, holds another data set, or is being packed.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: the last argument, OUT, must be a folder")
    description = out / DESCRIPTION
    if not description.exists():
        if (out / WORK_FOLDER / "plan.json").exists():
            raise UserError(f"{out} holds an unfinished pack: finish it, or choose another OUT")
        return []
    if not overwrite:
        raise UserError(
            f"{out} already holds a data set: choose another OUT, or replace its description and"
            " index with --overwrite (shards are never touched)"
        )
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        ours = INDEXER_KEY in content or PACKER_KEY in content
        names = [name for name in content["splits"] if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{description} was not written by rtl-dist, so it is not replaced: choose another OUT,"
            " or move the file away yourself"
        )
    ends = (".npy", ".labels.npy")
    index = [out / INDEX_FOLDER / f"{name}{end}" for name in names for end in ends]
    return [description, out / LEFT_OUT_FILE, *index]  # a half-removed data set is none


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


def describe_split(
    split: str,
    out: Path,
    numbers: Sequence[int],
    scans: Sequence[ShardScan],
    found: Labelling,
    splits: list[list[str]],
    num_left_out: int,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(a split's entry in ``dataset.json``, its index files by name).

    ``numbers`` are the split's shards among ``scans``, in order; ``splits`` says each sample's
    split, since two splits may share shards.
    """
    shards = []
    rows = []
    labels: list[tuple[int, ...]] = []
    for number, shard in enumerate(numbers):
        scan = scans[shard]
        its = [i for i, name in enumerate(splits[shard]) if name == split]
        its_rows = scan.rows[its]
        its_rows["shard"] = number
        rows.append(its_rows)
        labels += [found.labels[shard][i] for i in its]
        shards.append(
            {
                "path": shard_path(scan.location, out),
                "num_samples": len(its),
                "bytes": scan.bytes,
                "sha256": scan.sha256,
            }
        )
    index = np.concatenate(rows)
    num_classes = len(found.classes)
    matrix = None
    if found.task == MULTI_LABEL:
        index["label"] = -1
        matrix = np.zeros((len(index), num_classes), np.uint8)
        for row, several in enumerate(labels):
            matrix[row, list(several)] = 1
        counts = matrix.sum(axis=0, dtype=np.int64)
    else:
        index["label"] = [only[0] for only in labels]
        counts = np.bincount(index["label"], minlength=num_classes)
    entry: dict[str, Any] = {
        "num_samples": len(index),
        "class_counts": counts.tolist(),
        "num_left_out": num_left_out,
        "shards": shards,
    }
    files = {f"{split}.npy": npy_bytes(index)}
    entry["index_sha256"] = hashlib.sha256(files[f"{split}.npy"]).hexdigest()
    if matrix is not None:
        files[f"{split}.labels.npy"] = npy_bytes(matrix)
        entry["labels_sha256"] = hashlib.sha256(files[f"{split}.labels.npy"]).hexdigest()
    return entry, files


def publish(
    out: Path,
    description: dict[str, Any],
    files: dict[str, bytes],
    left_out: Sequence[LeftOutSample],
    overwrite: bool,
) -> str:
    """Writes everything into OUT, ``dataset.json`` last. Returns its fingerprint.

    Raises:
        UserError: OUT cannot be written, or holds another data set by now.
    """
    description["fingerprint"] = fingerprint_of(description)
    with locked(out):
        for old in check_place(out, overwrite):
            old.unlink(missing_ok=True)
        for name, content in files.items():
            _write(out, out / INDEX_FOLDER / name, content)
        if left_out:
            table = io.StringIO(newline="")
            rows = csv.writer(table, lineterminator="\n")
            rows.writerow(["shard", "key", "reason"])
            rows.writerows((shard_path(one.shard, out), one.key, one.reason) for one in left_out)
            _write(out, out / LEFT_OUT_FILE, table.getvalue().encode("utf-8", "surrogateescape"))
        text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
        _write(out, out / DESCRIPTION, text.encode())
    return str(description["fingerprint"])


def description_of(
    found: Labelling, settings: dict[str, Any], entries: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The whole of ``dataset.json`` but the fingerprint."""
    return {
        "format": FORMAT,
        "task": found.task,
        "classes": list(found.classes),
        INDEXER_KEY: {
            "version": 1,
            "image": found.image,
            "label": found.label,
            "field": found.field,
            **settings,
        },
        "splits": entries,
    }


def _write(out: Path, final: Path, content: bytes) -> None:
    with publishing(out, final) as file:
        file.write(content)
