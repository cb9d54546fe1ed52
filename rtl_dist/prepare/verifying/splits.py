"""A split's index and labels against its description, going on after whatever is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, RtlDistError
from rtl_dist.core.files import sha256_of
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import and_more
from rtl_dist.data.format.dataset import INDEX_FOLDER, LOAD_ERRORS, Dataset
from rtl_dist.data.format.split import INDEX_DTYPE, Split
from rtl_dist.data.storage.shard_files import Shards
from rtl_dist.prepare.verifying.findings import Damage, DamageList


@dataclass(frozen=True, kw_only=True)
class CheckedSplit:
    """A split as far as it can be read."""

    split: Split
    """Put together without the checks of ``Dataset.split``: its index has ``INDEX_DTYPE`` but any
    number of rows (none if it cannot be used), with anything in them."""
    has_labels: bool
    """False: the label file of multi-label data cannot be used."""

    @property
    def name(self) -> str:
        return self.split.name

    @property
    def num_rows(self) -> int:
        return len(self.split.index)

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """Class numbers (n,), or 0/1 rows (n, classes); what stands there, right or wrong."""
        if not self.has_labels:
            return np.zeros((len(samples), 0), np.uint8)
        if self.split.label_matrix is not None:
            return np.asarray(self.split.label_matrix[samples])
        return np.asarray(self.split.index["label"][samples])

    def class_counts(self) -> list[int]:
        """Samples of each class by the index, labels out of range left out."""
        num_classes = len(self.split.class_counts)
        if not self.has_labels:
            return [0] * num_classes
        if self.split.label_matrix is not None:
            counts: list[int] = np.count_nonzero(self.split.label_matrix, axis=0).tolist()
            return counts
        labels = self.split.index["label"]
        labels = labels[(labels >= 0) & (labels < num_classes)]
        return np.bincount(labels, minlength=num_classes).tolist()

    def samples_by_shard(self) -> Iterator[np.ndarray]:
        """The sample numbers of each shard, ascending."""
        shard_of = self.split.index["shard"]
        order = np.argsort(shard_of, kind="stable")
        ends = np.searchsorted(shard_of, range(len(self.split.shards)), "right", sorter=order)
        start = 0
        for end in ends:
            yield order[start:end]
            start = end

    def key(self, sample: int) -> str | None:
        """A sample's key; None where the shard or its header cannot be read."""
        try:
            key = self.split.key(sample)
        except RtlDistError:
            return None
        # foreign tars may hold anything, and this goes to a terminal
        return "".join(letter if letter.isprintable() else "?" for letter in key)


def check_split(dataset: Dataset, name: str, found: DamageList) -> CheckedSplit:
    """Reads a split's index and compares it with the description, adding to ``found``.

    Raises:
        DataError: the description itself lacks something.
        RemoteError: a remote place cannot be reached.
    """
    entry = dataset.description["splits"][name]
    try:
        shards = Shards(entry["shards"])
        packed = sum(shard.num_samples for shard in shards)
        num_samples = int(entry["num_samples"])
        counts = tuple(map(int, entry["class_counts"]))
        if len(counts) != dataset.num_classes:
            raise ValueError(f"it counts {len(counts)} classes of {dataset.num_classes}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"dataset.json: split {name!r} is not described as it should be ({error!r}); pack again"
        ) from error
    files = _IndexFiles(dataset, name, found)
    index = files.read("", entry.get("index_sha256"), (num_samples,), INDEX_DTYPE)
    matrix = None
    if dataset.task == MULTI_LABEL:
        shape = (num_samples, dataset.num_classes)
        matrix = files.read(".labels", entry.get("labels_sha256"), shape, np.dtype(np.uint8))
        if len(matrix) != len(index):  # no row then says whose labels it holds
            matrix = None
    split = CheckedSplit(
        split=Split(
            name=name,
            dataset=dataset.place,
            shards=shards,
            files=dataset.shard_files(shards),
            class_counts=counts,
            index=index,
            label_matrix=matrix,
            are_ours=dataset.is_ours,
            reopen=dataset.reopening(name),
        ),
        has_labels=dataset.task != MULTI_LABEL or matrix is not None,
    )
    if packed != num_samples:
        what = f"split {name!r} has {num_samples} samples, its shards {packed}"
        found.add([Damage(kind="totals", split=name, where="dataset.json", what=what)])
    if len(index):
        found.add(_check_rows(split))
        found.add(_check_class_counts(split))
    return split


class _IndexFiles:
    """Reads a split's index files, collecting what is wrong with them."""

    def __init__(self, dataset: Dataset, split: str, found: DamageList) -> None:
        self._dataset = dataset
        self._split = split
        self._found = found

    def read(
        self, suffix: str, sha256: str | None, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> np.ndarray:
        """The array, memory-mapped; without rows if it has another dtype or width."""
        name = f"{self._split}{suffix}.npy"
        where = f"{INDEX_FOLDER}/{name}"
        empty = np.zeros((0, *shape[1:]), dtype)
        try:
            path = self._dataset.index_path(self._split, f"{suffix}.npy", checked_bytes=sys.maxsize)
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if sha256 is not None and sha256_of(path) != sha256:
                self._add(where, "its sha256 is not that of dataset.json")
        except (DataError, *LOAD_ERRORS) as error:
            self._add(where, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            return empty
        if array.shape != shape or array.dtype != dtype:
            self._add(where, f"holds {array.dtype} {array.shape}, expected {dtype} {shape}")
        if array.ndim != len(shape) or array.shape[1:] != shape[1:] or array.dtype != dtype:
            return empty
        return array

    def _add(self, where: str, what: str) -> None:
        damage = Damage(kind="index_file", split=self._split, where=where, what=what)
        self._found.add([damage])


def _check_rows(split: CheckedSplit) -> Iterator[Damage]:
    """Whether the rows follow the shards, as many for each as it has samples."""
    where = f"{INDEX_FOLDER}/{split.name}.npy"
    shards = split.split.shards
    shard_of = split.split.index["shard"]
    for sample in np.flatnonzero(shard_of >= len(shards)):
        yield Damage(
            kind="index_row",
            split=split.name,
            where=where,
            what=f"names shard {shard_of[sample]}, but there are {len(shards)}",
            sample=int(sample),
        )
    for sample in np.flatnonzero(shard_of[1:] < shard_of[:-1])[:1] + 1:
        yield Damage(
            kind="index_row",
            split=split.name,
            where=where,
            what="rows do not follow the shards from here on",
            sample=int(sample),
        )
    rows = np.bincount(shard_of[shard_of < len(shards)], minlength=len(shards))
    for shard, count in zip(shards, rows, strict=True):
        if shard.num_samples != count:
            what = f"has {count} rows for {shard.num_samples} samples of {shard.path}"
            yield Damage(kind="totals", split=split.name, where=where, what=what)


def _check_class_counts(split: CheckedSplit) -> Iterator[Damage]:
    told = split.split.class_counts
    counts = split.class_counts()
    wrong = [n for n, count in enumerate(counts) if count != told[n]]
    if wrong and split.has_labels:
        n = wrong[0]
        more = and_more(len(wrong) - 1, " (and of {:,} more classes)")
        yield Damage(
            kind="totals",
            split=split.name,
            where=f"{INDEX_FOLDER}/{split.name}.npy",
            what=f"has {counts[n]} samples of class {n}{more}, dataset.json {told[n]}",
        )
