"""A data set, published: the index of each split, what was left out, and last ``dataset.json``.

Nothing in them depends on where or when the data set was made.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.csv_cells import csv_text
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import and_more
from rtl_dist.data.format.dataset import INDEX_FOLDER
from rtl_dist.data.format.description import DESCRIPTION, FORMAT, fingerprint_of
from rtl_dist.data.format.sources import sources_path, sources_table
from rtl_dist.data.storage.shard_files import Shard
from rtl_dist.prepare.work_folder import publishing

LEFT_OUT_FILE = "left_out.csv"
_LEFT_OUT_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class IndexedSplit:
    """A split, ready to be published."""

    entry: dict[str, Any]
    """What ``dataset.json`` says of it."""
    files: dict[str, bytes]
    """Its index files by their names in ``INDEX_FOLDER``."""


@dataclass(frozen=True, kw_only=True)
class LeftOutTable:
    """What ``left_out.csv`` says."""

    header: Sequence[str]
    """Names of the columns."""
    rows: Iterable[Sequence[str]]
    """A row each image or sample; without any there is no file."""


def index_split(
    name: str,
    index: np.ndarray,
    labels: Sequence[tuple[int, ...]],
    shards: Sequence[Shard],
    *,
    task: str,
    num_classes: int,
    num_left_out: int,
) -> IndexedSplit:
    """Fills in the labels, counts the classes, and takes the sums of the index files.

    Args:
        index: ``INDEX_DTYPE`` (num_samples,), in the order of the shards; its labels are set here.
        labels: class numbers of each sample; exactly one in single-label data.
        num_left_out: images or samples of the split that are in no row.
    """
    matrix = None
    if task == MULTI_LABEL:
        index["label"] = -1
        matrix = np.zeros((len(index), num_classes), np.uint8)
        for row, several in enumerate(labels):
            matrix[row, list(several)] = 1
        counts = matrix.sum(axis=0, dtype=np.int64)
    else:
        index["label"] = [only[0] for only in labels]
        counts = np.bincount(index["label"], minlength=num_classes)
    files = {f"{name}.npy": _npy_bytes(index)}
    entry = {
        "num_samples": len(index),
        "class_counts": counts.tolist(),
        "num_left_out": num_left_out,
        "shards": [asdict(shard) for shard in shards],
        "index_sha256": hashlib.sha256(files[f"{name}.npy"]).hexdigest(),
    }
    if matrix is not None:
        files[f"{name}.labels.npy"] = _npy_bytes(matrix)
        entry["labels_sha256"] = hashlib.sha256(files[f"{name}.labels.npy"]).hexdigest()
    return IndexedSplit(entry=entry, files=files)


def publish_dataset(
    out: Path,
    *,
    task: str,
    classes: Sequence[str],
    made_by: dict[str, Any],
    splits: dict[str, IndexedSplit],
    left_out: LeftOutTable,
    sources: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> str:
    """Writes the index, ``left_out.csv`` if there is anything to say, and last ``dataset.json``.
    The caller holds the lock of OUT.

    Args:
        made_by: the maker's key in the description, and its settings.
        sources: (key, file) of each sample, by split.

    Returns:
        The fingerprint.

    Raises:
        OSError: OUT cannot be written.
    """
    for split in splits.values():
        for name, content in split.files.items():
            _write(out, f"{INDEX_FOLDER}/{name}", content)
    for name, its_sources in (sources or {}).items():
        _write(out, sources_path(name), sources_table(its_sources))
    rows = list(left_out.rows)
    if rows:
        table = csv_text(left_out.header, rows)
        _write(out, LEFT_OUT_FILE, table.encode("utf-8", "surrogateescape"))
    description: dict[str, Any] = {
        "format": FORMAT,
        "task": task,
        "classes": list(classes),
        **made_by,
        "splits": {name: split.entry for name, split in splits.items()},
    }
    fingerprint = description["fingerprint"] = fingerprint_of(description)
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    _write(out, DESCRIPTION, text.encode())
    return fingerprint


def published_files(splits: Collection[str]) -> list[str]:
    """All that ``publish_dataset`` may write for these splits, relative to OUT.

    The description comes first: what is half removed must not look like a data set.
    """
    ends = (".npy", ".labels.npy")
    index = [f"{INDEX_FOLDER}/{name}{end}" for name in splits for end in ends]
    return [DESCRIPTION, LEFT_OUT_FILE, *index, *map(sources_path, splits)]


def left_out_lines(left_out: Sequence[str], out: Path) -> list[str]:
    """What a command says of what it left out: the first few, and where all of them are."""
    lines = [f"left out: {one}" for one in left_out[:_LEFT_OUT_SHOWN]]
    where = f"all in {out / LEFT_OUT_FILE}"
    more = and_more(len(left_out) - _LEFT_OUT_SHOWN, "left out: {:,} more, ")
    return [*lines, more + where] if more else lines


def doubt_lines(doubtful: Sequence[str], out: Path) -> list[str]:
    """What a command says of images that it took with a doubt: the first few, and who names all."""
    lines = [f"doubtful: {one}" for one in doubtful[:_LEFT_OUT_SHOWN]]
    named = f"rtl-dist verify {out} names them"
    more = and_more(len(doubtful) - _LEFT_OUT_SHOWN, "doubtful: {:,} more, ")
    return [*lines, more + named] if more else lines


def _write(out: Path, name: str, content: bytes) -> None:
    with publishing(out, out / name) as file:
        file.write(content)


def _npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()
