"""The data set: ``dataset.json``, its splits, and what must be true of their files.

A data set is a folder (or URL) of plain WebDataset tars with ``dataset.json`` and, per split,
``index/<split>.npy`` (one ``INDEX_DTYPE`` row a sample, memory-mapped) and, for multi-label data,
``index/<split>.labels.npy`` (uint8, samples x classes). The index alone says where each sample's
bytes are, so any sample is one ``pread`` and no tar is ever walked while training.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.files import is_no_file, sha256_of
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL, Task
from rtl_dist.core.urls import Redirects, is_url, secret_in
from rtl_dist.data.format.description import DESCRIPTION, INDEXER_KEY, read_description
from rtl_dist.data.format.split import INDEX_DTYPE, DatasetPlace, Split
from rtl_dist.data.storage.cache import RemoteFile
from rtl_dist.data.storage.remote import size_of
from rtl_dist.data.storage.shard_files import ShardFiles, Shards

INDEX_FOLDER = "index"

_CHECKSUM_OF = {".npy": "index_sha256", ".labels.npy": "labels_sha256"}  # by the file's ending
_MOST_HEADER = 4096  # bytes of an array's file before its values
CHECKED_INDEX_BYTES = 2**30  # larger ones are neither read at every start nor read ahead
# What numpy lets the damaged header of an array file out as.
LOAD_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    TokenError,
)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set, opened: the description checked, splits opened on demand."""

    place: DatasetPlace
    """Where it is."""
    task: Task
    """``single_label`` or ``multi_label``."""
    classes: tuple[str, ...]
    """Their names; a class number is a place here."""
    fingerprint: str
    """sha256 in hex; see ``fingerprint_of``."""
    description: dict[str, Any] = field(repr=False)
    """What ``dataset.json`` says, its splits not yet checked."""

    @property
    def where(self) -> str:
        """Its folder or URL."""
        return self.place.where

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def split_names(self) -> tuple[str, ...]:
        return tuple(self.description["splits"])

    @property
    def judging_split(self) -> str:
        """The name of that by which a model is judged if no other is asked for."""
        return "test" if "test" in self.split_names else "val"

    @property
    def is_ours(self) -> bool:
        """Whether ``pack`` made the shards, not somebody else."""
        return INDEXER_KEY not in self.description

    def shard_files(self, shards: Shards) -> ShardFiles:
        """These shards' files, with a cache if any of them is remote."""
        has_remote = self.place.is_remote or shards.has_urls()
        return ShardFiles(self.where, shards, self.place.cache if has_remote else None)

    def split(self, name: str, *, trusts_cache: bool = False) -> Split:
        """Opens a split, at a cost that does not grow with its samples, but for an index that is
        compared with its checksum; ``check_split`` looks at its files.

        Args:
            trusts_cache: the cached index of remote data was looked at by another process.

        Raises:
            DataError: no such split, or its index does not fit the description.
        """
        splits = self.description["splits"]
        if name not in splits:
            raise DataError(
                f"{self.place.path_of(DESCRIPTION)} has no split {name!r}; it has:"
                f" {', '.join(splits)}. Name one of these, or pack or index again"
                " (--val-fraction 0.2 makes a val of train)"
            )
        entry = splits[name]
        self._check_entry(name, entry)
        index = self._load_array(name, ".npy", trusts_cache)
        if index.dtype != INDEX_DTYPE or index.shape != (entry["num_samples"],):
            raise DataError(
                f"the index of split {name!r} in {self.where} does not fit {DESCRIPTION}; pack"
                " again"
            )
        label_matrix = None
        if self.task == MULTI_LABEL:
            label_matrix = self._load_array(name, ".labels.npy", trusts_cache)
            expected = (len(index), self.num_classes)
            if label_matrix.shape != expected or label_matrix.dtype != np.uint8:
                raise DataError(
                    f"labels of split {name!r} are {label_matrix.dtype} {label_matrix.shape},"
                    f" expected uint8 {expected}; pack {self.where} again"
                )
        shards = Shards(entry["shards"])
        return Split(
            name=name,
            dataset=self.place,
            shards=shards,
            files=self.shard_files(shards),
            class_counts=tuple(entry["class_counts"]),
            index=index,
            label_matrix=label_matrix,
            are_ours=self.is_ours,
            reopen=self.reopening(name),
        )

    def reopening(self, name: str) -> Callable[[], Split]:
        """What opens a split again in another process; it can be pickled."""
        return functools.partial(_open_split, self.place, name)

    def index_path(
        self, split: str, suffix: str, *, checked_bytes: int = CHECKED_INDEX_BYTES
    ) -> Path:
        """The local file of an index; a remote one is fetched into the cache first, and anew where
        the copy there is damaged.

        Args:
            suffix: ``.npy``, or of the labels ``.labels.npy``.
            checked_bytes: the copy of a larger one is not compared with its checksum.

        Raises:
            DataError: it is not what the description says.
            RemoteError: a remote place cannot be reached.
        """
        where = self.place.path_of(f"{INDEX_FOLDER}/{split}{suffix}")
        if not self.place.is_remote:
            if is_no_file(Path(where)):
                raise DataError(f"the index {where} is not a plain file; restore it or pack again")
            return Path(where)
        sha256 = self.description["splits"][split].get(_CHECKSUM_OF[suffix])
        if sha256 is None:
            raise DataError(f"{self.where} does not say the checksum of {where}; pack again")
        file = RemoteFile(url=where, bytes=self._index_bytes(split, suffix, where), sha256=sha256)
        if file.bytes > checked_bytes:
            return self.place.cache.path(file)
        return self.place.cache.sound_path(file)

    def _index_bytes(self, split: str, suffix: str, where: str) -> int:
        """Its size, as the server says, which must be that of so many rows and a header."""
        width = INDEX_DTYPE.itemsize if suffix == ".npy" else self.num_classes
        rows = self.description["splits"][split]["num_samples"] * width
        found = size_of(where, self.place.redirects)
        if not rows <= found <= rows + _MOST_HEADER:
            raise DataError(
                f"the index {where} has {found:,} bytes, which do not fit the samples that"
                f" {DESCRIPTION} tells of; restore it or pack again"
            )
        return found

    def _load_array(self, split: str, suffix: str, trusts_cache: bool) -> np.ndarray:
        checked_bytes = -1 if trusts_cache else CHECKED_INDEX_BYTES
        path = self.index_path(split, suffix, checked_bytes=checked_bytes)
        try:
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except LOAD_ERRORS as error:
            if self.place.is_remote and isinstance(error, FileNotFoundError):
                # another process made room just now
                return self._load_array(split, suffix, trusts_cache)
            raise DataError(f"cannot read the index {path}: {error}; pack again") from error
        if array.nbytes > CHECKED_INDEX_BYTES and isinstance(array.base, mmap.mmap):
            # else each row of 24 bytes brings in the disk's whole read-ahead, which may be 8 MB
            array.base.madvise(mmap.MADV_RANDOM)
        return array

    def _check_entry(self, name: str, entry: dict[str, Any]) -> None:
        """What is counted on later: counts that add up, shards that say all of themselves.

        Raises:
            DataError: the description is not one that we wrote.
        """
        where = self.place.path_of(DESCRIPTION)
        try:
            whole = all(
                isinstance(shard["path"], str)
                and len(bytes.fromhex(shard["sha256"])) == 32
                and shard["bytes"] >= 0 <= shard["num_samples"]
                for shard in entry["shards"]
            )
            counted = sum(shard["num_samples"] for shard in entry["shards"])
            whole = whole and counted == entry["num_samples"]
            counts = entry["class_counts"]
            if self.task == SINGLE_LABEL:
                whole = whole and sum(counts) == counted
            whole = whole and len(counts) == self.num_classes
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: split {name!r} is not described as it should be ({error!r}); pack again"
            ) from error
        if not whole:
            raise DataError(
                f"the class counts, shards and samples of split {name!r} in {where} do not add up;"
                " pack again"
            )
        if self.place.is_remote:
            for shard in entry["shards"]:
                path = shard["path"]
                if is_url(path) or path.startswith("/") or ".." in path.split("/"):
                    raise DataError(
                        f"{where}: shard {path!r} lies outside of the data set, which remote data"
                        " may not ask for; copy the description and index to a local folder"
                    )


def check_split(dataset: Dataset, split: Split) -> None:
    """Looks at a split's files before they are used: the index's checksum, each shard's size.

    Raises:
        DataError: something is missing or was altered since packing.
        RemoteError: a remote place cannot be reached.
    """
    check_index(dataset, split.name)
    split.files.check_sizes()


def check_index(dataset: Dataset, split: str) -> None:
    """Compares a split's index with its checksum; one too large to read at every start is left to
    the checks of each sample.

    Raises:
        DataError: it was altered since packing.
    """
    entry = dataset.description["splits"][split]
    for suffix, key in _CHECKSUM_OF.items():
        if key not in entry:
            continue
        path = dataset.index_path(split, suffix)
        if path.stat().st_size <= CHECKED_INDEX_BYTES and sha256_of(path) != entry[key]:
            raise DataError(f"the index {path} was altered since packing; restore it or pack again")


def open_dataset(
    path: str | Path,
    *,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    redirects: Redirects = "origin",
) -> Dataset:
    """Opens the data set in a folder or behind a URL.

    Args:
        cache_dir, cache_gb, redirects: of remote shards; see ``Cache``.

    Raises:
        UserError: the URL holds a password or token.
        DataError: there is none, or its description is damaged, edited or of another format.
        RemoteError: the place cannot be reached.
    """
    if is_url(str(path)) and (reason := secret_in(str(path))):
        raise UserError(reason)
    place = DatasetPlace(
        where=str(path), cache_dir=cache_dir, cache_gb=cache_gb, redirects=redirects
    )
    description = read_description(place)
    return Dataset(
        place=place,
        task=Task(description["task"]),
        classes=tuple(map(str, description["classes"])),
        fingerprint=description["fingerprint"],
        description=description,
    )


def _open_split(place: DatasetPlace, name: str) -> Split:
    dataset = open_dataset(
        place.where,
        cache_dir=place.cache_dir,
        cache_gb=place.cache_gb,
        redirects=place.redirects,
    )
    return dataset.split(name, trusts_cache=True)
