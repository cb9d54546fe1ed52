"""One split: its index, its shards, and reading one sample by number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import RtlDistError, ShardError
from rtl_dist.core.text import shown
from rtl_dist.core.urls import Redirects, is_url, join_url
from rtl_dist.data.format.sources import read_sources, sources_path
from rtl_dist.data.format.tar_reader import member_names
from rtl_dist.data.storage.cache import Cache
from rtl_dist.data.storage.shard_files import ShardFiles, Shards

# 24 bytes a sample: where the image's bytes are (offset and size in bytes within the tar), their
# crc32, and the class number (-1 in multi-label data, whose labels are in their own array).
INDEX_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("crc32", "<u4"), ("label", "<i4")]
)

_TAR_BLOCK = 512
_MOST_LOOKED_THROUGH = 64 << 20  # bytes of a table, for one sample


@dataclass(frozen=True, kw_only=True)
class DatasetPlace:
    """Where a data set is, and where what is fetched of it is kept."""

    where: str
    """Its folder, or a URL."""
    cache_dir: str | None = None
    """``Cache``'s folder; None for the user's own."""
    cache_gb: float | None = None
    """How much the cache may hold, in 10^9 bytes; None for a part of what the disk has free."""
    redirects: Redirects = "origin"
    """Whether they are followed to other servers, too."""

    @property
    def is_remote(self) -> bool:
        return is_url(self.where)

    def path_of(self, name: str) -> str:
        """The path or URL of one of its files."""
        return join_url(self.where, name) if self.is_remote else os.path.join(self.where, name)

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.cache_dir, self.cache_gb, self.redirects)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split: its shards, and memory-mapped index and labels."""

    name: str
    """As ``dataset.json`` has it, such as ``train``."""
    dataset: DatasetPlace
    """The data set that it is a split of."""
    shards: Shards
    """What the description says of each tar, in the index's order."""
    files: ShardFiles
    """The same tars, opened when they are read."""
    class_counts: tuple[int, ...]
    """Samples of each class; in multi-label data those that have it."""
    index: np.ndarray
    """``INDEX_DTYPE`` (num_samples,), shard after shard."""
    label_matrix: np.ndarray | None
    """uint8 (num_samples, num_classes) of 0 and 1 in multi-label data, else None."""
    are_ours: bool
    """``pack`` made the shards, not somebody else."""
    reopen: Callable[[], Split]
    """Opens it in another process, to which it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process maps the index again instead of receiving a copy of it
        return self.reopen, ()

    @property
    def num_samples(self) -> int:
        return len(self.index)

    @property
    def is_remote(self) -> bool:
        """Whether its shards are fetched before they are read."""
        return self.files.cache is not None

    def shard_path(self, number: int) -> Path:
        """The local file of a shard; a remote one is fetched into the cache first."""
        return self.files.path(number)

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """Class numbers, int64 (n,); or 0/1 float32 (n, num_classes) for multi-label data.

        Raises:
            ShardError: a class number is out of range.
        """
        if self.label_matrix is not None:
            return np.asarray(self.label_matrix[samples], dtype=np.float32)
        labels = np.asarray(self.index["label"][samples], dtype=np.int64)
        # checked here and not when opening, which must not read all of a large index
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.class_counts)))
        if wrong.size:
            raise ShardError(
                f"label out of range: {self.describe(int(samples[wrong[0]]))} has class"
                f" {labels[wrong[0]]}, but there are {len(self.class_counts)}; pack again"
            )
        return labels

    @property
    def label_bytes(self) -> int:
        """Of one sample's, as ``labels`` returns it."""
        return 8 if self.label_matrix is None else 4 * self.label_matrix.shape[1]

    def row(self, sample: int) -> tuple[int, int, int, int]:
        """(shard, offset, size, crc32) of a sample's image.

        Raises:
            ShardError: the index names bytes that no shard has.
        """
        offset, size, shard, crc32, _ = self.index[sample].tolist()
        if shard >= len(self.shards) or offset + size > self.shards[shard].bytes:
            raise ShardError(
                f"the index of split {self.name!r} in {self.dataset.where} was altered: sample"
                f" {sample} lies outside of its shard; restore it or make it again"
            )
        return shard, offset, size, crc32

    def key(self, sample: int) -> str:
        """The sample's WebDataset key, as its shard has it. Raises as ``SampleReader.read``."""
        shard, offset, _, _ = self.row(sample)
        return _key_of(self._member_name(shard, offset))

    def keys(self) -> Iterator[str]:
        """Every sample's key in the samples' order. Raises as ``SampleReader.read``."""
        return (self.key(sample) for sample in range(self.num_samples))

    def files_of(self, keys: Mapping[int, str]) -> dict[int, str]:
        """The user's files that samples were packed from, as far as that is known here.

        Args:
            keys: of the samples that are asked for.
        """
        known = self.are_ours and not self.dataset.is_remote
        return read_sources(Path(self._sources_path), keys) if known else {}

    def name_of(self, sample: int) -> str:
        """The key where that costs no more than a read, else number and shard."""
        shard = self.row(sample)[0]
        if self.are_ours and not self.files.is_remote(shard):
            return self.key(sample)
        return f"number {sample} in {self.shards[shard].path}"

    def describe(self, sample: int) -> str:
        """Names a sample for an error message: split, key (if it can still be read) and shard."""
        try:
            shard = self.shards[self.row(sample)[0]].path
        except ShardError:
            return f"sample {sample} of split {self.name!r}"
        try:
            key = self.key(sample)
            where = f"key {key!r} in {shown(shard)}{self._made_of(sample, key)}"
        except RtlDistError:
            where = f"in {shown(shard)}"
        return f"sample {sample} of split {self.name!r} ({where})"

    def _made_of(self, sample: int, key: str) -> str:
        """The sample's file, where the table is short enough to be looked through each time."""
        path = Path(self._sources_path)
        if not path.is_file() or path.stat().st_size > _MOST_LOOKED_THROUGH:
            return ""
        file = self.files_of({sample: key}).get(sample)
        return "" if file is None else f", made of {shown(file)}"

    @property
    def _sources_path(self) -> str:
        return self.dataset.path_of(sources_path(self.name))

    def _member_name(self, shard: int, offset: int) -> str:
        if self.are_ours:  # one plain header directly before the bytes
            name = self.files.read(shard, offset - _TAR_BLOCK, 100)
            return name.rstrip(b"\0").decode("utf-8", "replace")
        path = self.shard_path(shard)
        try:
            return _names_in(str(path), path.stat().st_mtime_ns).get(offset, "?")
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror}; is it there?") from error


def _key_of(member: str) -> str:
    """WebDataset's rule: up to the first dot of the base name."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.split(".", 1)[0]


@lru_cache(maxsize=2)
def _names_in(path: str, modified_at: int) -> dict[int, str]:
    return member_names(Path(path))
