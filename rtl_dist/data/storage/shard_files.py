"""Where a split's shards are, and how their bytes are reached: local files, or cached remote ones.

A shard's path is relative to the data set, absolute, or a URL; ``rtl-dist index`` describes shards
that lie elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from rtl_dist.core.errors import DataError, ShardError, UserError
from rtl_dist.core.open_files import is_too_many, share_of_limit, too_many_open
from rtl_dist.core.text import and_more, readable_size
from rtl_dist.core.urls import is_url, join_url
from rtl_dist.data.storage.cache import Cache, RemoteFile
from rtl_dist.data.storage.remote import sizes_of

_MOST_OPEN_FILES = 256
_PARTS_OF_LIMIT = 8  # there are several splits, and all else that a process opens
_FETCHES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar, and what it must look like."""

    path: str
    """As the description gives it: within the data set's folder, absolute, or a URL."""
    num_samples: int
    """How many samples of the split lie in it."""
    bytes: int
    """Its size."""
    sha256: str
    """Of its content, in hex."""


class Shards(Sequence[Shard]):
    """The shards of a split, each made when asked for: there may be 10^5."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        entry = self._entries[number]
        return Shard(
            path=entry["path"],
            num_samples=entry["num_samples"],
            bytes=entry["bytes"],
            sha256=entry["sha256"],
        )

    def sizes(self) -> np.ndarray:
        """Samples of each shard, int64 (num_shards,)."""
        return np.fromiter((entry["num_samples"] for entry in self._entries), np.int64)

    def has_urls(self) -> bool:
        """Whether any lies at a URL of its own."""
        return any(is_url(entry["path"]) for entry in self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self._entries == other._entries


class ShardFiles:
    """Opens shards by number.

    Local ones are kept open, the least recently used closed when there are many. Remote ones are
    opened anew for each use, so that one that the cache lets go does not keep its room on disk.

    Args:
        root: folder or URL of the data set.
        cache: of remote shards; None when there are none.
    """

    def __init__(self, root: str, shards: Shards, cache: Cache | None) -> None:
        self._root, self._shards, self._cache = root, shards, cache
        self._open: dict[int, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # descriptors mean other files in another process
        return ShardFiles, (self._root, self._shards, self._cache)

    @property
    def cache(self) -> Cache | None:
        return self._cache

    def location(self, number: int) -> str:
        """A path or URL."""
        path = self._shards[number].path
        if is_url(path) or os.path.isabs(path):
            return path
        return join_url(self._root, path) if is_url(self._root) else os.path.join(self._root, path)

    def is_remote(self, number: int) -> bool:
        return is_url(self._root) or is_url(self._shards[number].path)

    def path(self, number: int) -> Path:
        """The local file, fetched into the cache first where it is remote. Raises as ``read``."""
        if (cache := self._cache_of(number)) is not None:
            return cache.path(self._remote_file(number))
        return Path(self.location(number))

    def sound_path(self, number: int) -> Path:
        """As ``path``; of a remote one a copy that has its checksum."""
        if (cache := self._cache_of(number)) is not None:
            return cache.sound_path(self._remote_file(number))
        return Path(self.location(number))

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; fewer where it ends early.

        Raises:
            ShardError: it is missing, unreadable or, if remote, not as described.
            RemoteError: it cannot be fetched. RtlDistError: the cache has no room.
        """
        if (cache := self._cache_of(number)) is not None:
            return cache.read(self._remote_file(number), offset, size)
        try:
            return os.pread(self._descriptor(number), size, offset)
        except OSError as error:
            if is_too_many(error):  # which says nothing of the data
                raise too_many_open(self.location(number)) from error
            raise ShardError(
                f"cannot read {self.location(number)}: {error.strerror}; is the file there?"
            ) from error

    def fetch(self, numbers: Iterable[int]) -> None:
        """Brings remote shards into the cache, several at once. Raises as ``read``."""
        missing = [n for n in numbers if not self.is_at_hand(n)]
        if len(missing) == 1:
            self.try_fetch(missing[0], wait=True)
        elif missing:
            with ThreadPoolExecutor(_FETCHES_AT_ONCE, "rtl_dist fetch") as pool:
                for _ in pool.map(lambda n: self.try_fetch(n, wait=True), missing):
                    pass

    def is_at_hand(self, number: int) -> bool:
        """Whether it can be read without fetching; if so it counts as just used."""
        cache = self._cache_of(number)
        return cache is None or cache.touch(self._remote_file(number))

    def try_fetch(self, number: int, *, wait: bool) -> bool:
        """Brings a shard into the cache; without ``wait``, not if another process is at it."""
        cache = self._cache_of(number)
        return cache is None or cache.fetch(self._remote_file(number), wait=wait)

    def check_sizes(self) -> None:
        """Looks at every shard's size, before anything is trained on them.

        Raises:
            DataError: names those that are missing, truncated or altered.
            RemoteError: a remote place cannot be reached.
        """
        urls = [self.location(n) for n in range(len(self._shards)) if self.is_remote(n)]
        remote_sizes = sizes_of(urls, self._cache.redirects) if self._cache and urls else {}
        wrong = []
        for number, shard in enumerate(self._shards):
            where = self.location(number)
            if self.is_remote(number):
                size, why = remote_sizes[where], "it is not there"
            else:
                size, why = _local_size(where)
            if size is None:
                wrong.append(f"shard {where} cannot be opened: {why}")
            elif size != shard.bytes:
                what = "truncated" if size < shard.bytes else "altered"
                wrong.append(
                    f"shard {where} was {what}: {size} bytes where {shard.bytes} were packed"
                )
        if wrong:
            more = and_more(len(wrong) - 1, " (and {:,} more shards)")
            raise DataError(f"{wrong[0]}{more}; restore it or pack again")

    def forget(self, number: int) -> bool:
        """Lets go of the cached copy of a remote shard, which may have been damaged on this disk;
        whether there was one."""
        cache = self._cache_of(number)
        return cache is not None and cache.forget(self._remote_file(number))

    def require_room(self, num_shards: int) -> None:
        """Whether the cache can hold ``num_shards`` of the remote shards at a time.

        Raises:
            UserError: it cannot, so that shards would come again and again.
        """
        if self._cache is None:
            return
        sizes = sorted(shard.bytes for n, shard in enumerate(self._shards) if self.is_remote(n))
        needed = sum(sizes[-num_shards:])
        if needed > self._cache.limit:
            raise UserError(
                f"data.cache_gb: the cache {self._cache.folder} may hold"
                f" {readable_size(self._cache.limit)}, this order of samples needs"
                f" {readable_size(needed)} at a time; raise it, or set data.shuffle=window (and a"
                " smaller data.window)"
            )

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _cache_of(self, number: int) -> Cache | None:
        """What a remote shard comes through; None for a local one."""
        return self._cache if self._cache is not None and self.is_remote(number) else None

    def _remote_file(self, number: int) -> RemoteFile:
        shard = self._shards[number]
        return RemoteFile(url=self.location(number), bytes=shard.bytes, sha256=shard.sha256)

    def _descriptor(self, number: int) -> int:
        descriptor = self._open.pop(number, None)
        if descriptor is None:
            most = share_of_limit(_PARTS_OF_LIMIT, most=_MOST_OPEN_FILES)
            while len(self._open) >= most:
                os.close(self._open.pop(next(iter(self._open))))
            try:
                descriptor = os.open(self.location(number), os.O_RDONLY)
            except OSError as error:
                if not is_too_many(error) or not self._open:
                    raise
                self.close()  # something else needs many
                descriptor = os.open(self.location(number), os.O_RDONLY)
        self._open[number] = descriptor  # last: most recently used
        return descriptor


def _local_size(path: str) -> tuple[int | None, str]:
    try:
        return os.stat(path).st_size, ""
    except OSError as error:
        return None, error.strerror or "unknown"
