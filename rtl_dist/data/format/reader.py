"""Reading samples by number, each checked against its checksum."""

from __future__ import annotations

import zlib

from rtl_dist.core.errors import DataError, ShardError
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.foreign import MAX_FILE_BYTES


class SampleReader:
    """Reads samples' image bytes with ``pread`` and checks each against its crc32.

    Decoders do not notice one flipped byte (they return wrong pixels), so the checksum must.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._fetched_anew: set[int] = set()

    def read(self, sample: int) -> bytes:
        """The sample's image file as bytes.

        Raises:
            ShardError: the whole shard is missing, unreadable or cut short.
            DataError: the sample's bytes changed since packing, or are more than any image's.
        """
        split = self._split
        shard, offset, size, crc32 = split.row(sample)
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{split.describe(sample)} is larger than the {MAX_FILE_BYTES >> 20} MiB allowed"
            )
        content = split.files.read(shard, offset, size)
        is_whole = zlib.crc32(content) == crc32
        if not is_whole and shard not in self._fetched_anew and split.files.forget(shard):
            self._fetched_anew.add(shard)  # once: it may be the index that is wrong
            content = split.files.read(shard, offset, size)  # fetched anew
            is_whole = zlib.crc32(content) == crc32
        if len(content) != size:
            raise ShardError(
                f"{split.describe(sample)} is cut short: the shard was truncated; restore it or"
                " pack again"
            )
        if not is_whole:
            raise DataError(
                f"{split.describe(sample)} fails its checksum: the shard was altered or"
                " damaged since packing; restore the file or pack again"
            )
        return content

    def close(self) -> None:
        self._split.files.close()
