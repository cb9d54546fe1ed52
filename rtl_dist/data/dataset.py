"""The packed data set on disk: ``dataset.json``, the index, and reading one sample by number.

A data set is a folder of plain WebDataset tars with ``dataset.json`` beside them and, per split,
``index/<split>.npy`` (one ``INDEX_DTYPE`` row a sample, memory-mapped) and, for multi-label data,
``index/<split>.labels.npy`` (uint8, samples x classes). The index alone says where each sample's
bytes are, so any sample is one ``pread`` and no tar is ever walked while training.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.errors import DataError
from rtl_dist.files import sha256_of

FORMAT = "rtl_dist/1"
DESCRIPTION = "dataset.json"
INDEX_FOLDER = "index"
SINGLE_LABEL = "single_label"
MULTI_LABEL = "multi_label"

# 24 bytes a sample: where the image's bytes are (offset and size in bytes within the tar), their
# crc32, and the class number (-1 in multi-label data, whose labels are in their own array).
INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("crc32", "<u4"), ("label", "<i4")]
)

_TAR_BLOCK = 512
_MOST_OPEN_FILES = 256
_CHECKED_INDEX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar: its path relative to the data set, and what it must look like."""

    path: str
    num_samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: its shards, and memory-mapped index and labels.

    ``index`` has dtype ``INDEX_DTYPE`` and shape (num_samples,). ``label_matrix`` is None or uint8
    of shape (num_samples, num_classes).
    """

    name: str
    root: Path
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]
    index: np.ndarray
    label_matrix: np.ndarray | None

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process maps the index again instead of receiving a copy of it
        return _reopen_split, (self.root, self.name)

    @property
    def num_samples(self) -> int:
        return len(self.index)

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """Class numbers, int64 (n,); or 0/1 float32 (n, num_classes) for multi-label data."""
        if self.label_matrix is not None:
            return np.asarray(self.label_matrix[samples], dtype=np.float32)
        labels = np.asarray(self.index["label"][samples], dtype=np.int64)
        # checked here and not when opening, which must not read all of a large index
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.class_counts)))
        if wrong.size:
            raise DataError(
                f"label out of range: {self.describe(int(samples[wrong[0]]))} has class"
                f" {labels[wrong[0]]}, but there are {len(self.class_counts)}; pack again"
            )
        return labels

    def key(self, sample: int) -> str:
        """The sample's WebDataset key, read from the tar header just before its bytes."""
        row = self.index[sample]
        with open(self.root / self.shards[row["shard"]].path, "rb") as tar:
            tar.seek(int(row["offset"]) - _TAR_BLOCK)
            name = tar.read(100).rstrip(b"\0").decode("utf-8", "replace")
        return name.rsplit(".", 1)[0]

    def keys(self) -> Iterator[str]:
        """Every sample's key in the samples' order, each tar opened once.

        Raises:
            DataError: a shard cannot be opened.
        """
        for shard, rows in groupby(self.index, key=lambda row: int(row["shard"])):
            path = self.root / self.shards[shard].path
            try:
                with open(path, "rb", buffering=0) as tar:
                    for row in rows:
                        tar.seek(int(row["offset"]) - _TAR_BLOCK)
                        name = tar.read(100).rstrip(b"\0").decode("utf-8", "replace")
                        yield name.rsplit(".", 1)[0]
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}; is it there?") from error

    def describe(self, sample: int) -> str:
        """Names a sample for an error message: split, key (if it can still be read) and shard."""
        shard = self.shards[self.index[sample]["shard"]].path
        try:
            where = f"key {self.key(sample)!r} in {shard}"
        except OSError:
            where = f"in {shard}"
        return f"sample {sample} of split {self.name!r} ({where})"


class SampleReader:
    """Reads samples' image bytes with ``pread`` and checks each against its crc32.

    Decoders do not notice one flipped byte (they return wrong pixels), so the checksum must.
    Keeps some files open; each loader worker makes its own reader.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._files: dict[int, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleReader, (self._split,)  # descriptors mean other files in another process

    def read(self, sample: int) -> bytes:
        """The sample's image file as bytes.

        Raises:
            DataError: the shard is unreadable, ends early, or its bytes changed since packing.
        """
        row = self._split.index[sample]
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        try:
            content = os.pread(self._open(shard), size, offset)
        except OSError as error:
            path = self._split.root / self._split.shards[shard].path
            raise DataError(f"cannot read {path}: {error.strerror}; is the file there?") from error
        if len(content) != size:
            raise DataError(
                f"{self._split.describe(sample)} is cut short: the shard was truncated; pack again"
            )
        if zlib.crc32(content) != row["crc32"]:
            raise DataError(
                f"{self._split.describe(sample)} fails its checksum: the shard was altered or"
                " damaged since packing; restore the file or pack again"
            )
        return content

    def _open(self, shard: int) -> int:
        """The shard's file descriptor; the least recently used one is closed when there are many,
        since a process may have but some hundreds open."""
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            if len(self._files) >= _MOST_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            path = self._split.root / self._split.shards[shard].path
            descriptor = os.open(path, os.O_RDONLY)
        self._files[shard] = descriptor  # last: most recently used
        return descriptor

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A packed data set, opened: the description checked, splits opened on demand."""

    root: Path
    task: str
    classes: tuple[str, ...]
    fingerprint: str
    description: dict[str, Any] = field(repr=False)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def split_names(self) -> tuple[str, ...]:
        return tuple(self.description["splits"])

    def split(self, name: str) -> Split:
        """Opens a split.

        Raises:
            DataError: no such split, or its shards or index are missing, cut or of another size.
        """
        splits = self.description["splits"]
        if name not in splits:
            raise DataError(
                f"{self.root / DESCRIPTION} has no split {name!r}; it has: {', '.join(splits)}."
                " Name one of these, or pack again (--val-fraction 0.2 makes a val of train)"
            )
        entry = splits[name]
        shards = tuple(
            Shard(
                path=s["path"], num_samples=s["num_samples"], bytes=s["bytes"], sha256=s["sha256"]
            )
            for s in entry["shards"]
        )
        for shard in shards:
            _check_shard_size(self.root / shard.path, shard.bytes)
        index = _load_array(self.root / INDEX_FOLDER / f"{name}.npy")
        if index.dtype != INDEX_DTYPE or len(index) != entry["num_samples"]:
            raise DataError(
                f"the index of split {name!r} in {self.root} does not fit dataset.json; pack again"
            )
        label_matrix = None
        if self.task == MULTI_LABEL:
            label_matrix = _load_array(self.root / INDEX_FOLDER / f"{name}.labels.npy")
            expected = (len(index), self.num_classes)
            if label_matrix.shape != expected:
                raise DataError(
                    f"labels of split {name!r} have shape {label_matrix.shape}, "
                    f"expected {expected}; pack {self.root} again"
                )
        elif len(entry["class_counts"]) != self.num_classes or (
            sum(entry["class_counts"]) != len(index)
        ):
            raise DataError(
                f"the class counts of split {name!r} in {self.root / DESCRIPTION} do not add up;"
                " pack again"
            )
        return Split(
            name=name,
            root=self.root,
            shards=shards,
            class_counts=tuple(entry["class_counts"]),
            index=index,
            label_matrix=label_matrix,
        )


def check_index(dataset: Dataset, split: str) -> None:
    """Compares a split's index with its checksum; one too large to read at every start is left to
    the size checks.

    Raises:
        DataError: it was altered since packing.
    """
    entry = dataset.description["splits"][split]
    for suffix, key in ((".npy", "index_sha256"), (".labels.npy", "labels_sha256")):
        path = dataset.root / INDEX_FOLDER / f"{split}{suffix}"
        if key not in entry or path.stat().st_size > _CHECKED_INDEX_BYTES:
            continue
        if sha256_of(path) != entry[key]:
            raise DataError(f"the index {path} was altered since packing; restore it or pack again")


def open_dataset(path: str | Path) -> Dataset:
    """Opens the data set in a folder.

    Raises:
        DataError: there is none, or its description is damaged, edited or of another format.
    """
    root = Path(path)
    try:
        description = json.loads((root / DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"no data set at {root}: {DESCRIPTION} is missing; make it with"
            f" `rtl-dist pack SOURCE {root}`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {root / DESCRIPTION}: {error}; pack again") from error
    try:
        if description["format"] != FORMAT:
            raise DataError(
                f"{root / DESCRIPTION} is of format {description['format']!r}; this version reads"
                f" {FORMAT!r}: pack again"
            )
        if description["fingerprint"] != fingerprint_of(description):
            raise DataError(
                f"{root / DESCRIPTION} does not match its own fingerprint: it was edited or"
                " damaged; pack again"
            )
        return Dataset(
            root=root,
            task=description["task"],
            classes=tuple(description["classes"]),
            fingerprint=description["fingerprint"],
            description=description,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{root / DESCRIPTION} lacks {error}; pack again") from error


def _reopen_split(root: Path, name: str) -> Split:
    return open_dataset(root).split(name)


def fingerprint_of(description: dict[str, Any]) -> str:
    """sha256 over the whole description but the fingerprint itself.

    The description holds each shard's sha256 and each index file's, so equal fingerprints mean
    equal classes, samples, labels and bytes.
    """
    content = {key: value for key, value in description.items() if key != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_shard_size(path: Path, expected: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {path} cannot be opened: {error.strerror}; restore it or pack again"
        ) from error
    if actual != expected:
        what = "truncated" if actual < expected else "altered"
        raise DataError(
            f"shard {path} was {what}: {actual} bytes where {expected} were packed; restore it or"
            " pack again"
        )


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the index {path}: {error}; pack again") from error
