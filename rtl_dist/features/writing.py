"""Writes the blocks of a view in a thread, while the next ones are computed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from rtl_dist.features.seal import Seal
from rtl_dist.features.view_files import BlockSums, write_block

_MOST_UNDER_WAY = 2  # blocks in memory that are not on the disk yet


class WrittenBlock(NamedTuple):
    """A block that was written."""

    first: int
    """Number of its first row."""
    sums: BlockSums
    """Of its rows."""
    used: list[int]
    """The samples that its rows really are of."""


class BlockWriter:
    """Writes into one reserved folder; leaving the block waits for what is under way.

    has_failed: the disk did, and nothing more is written.
    """

    def __init__(self, folder: Path, seal: Seal) -> None:
        self._folder, self._seal = folder, seal
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._under_way: deque[tuple[int, list[int], Future[BlockSums]]] = deque()
        self._written: list[WrittenBlock] = []
        self.has_failed = False

    def write(self, first: int, rows: torch.Tensor, used: list[int]) -> None:
        """Begins to write rows, on the host, from number ``first`` on. See ``WrittenBlock``."""
        if self.has_failed:
            return
        sums = self._thread.submit(write_block, self._folder, first, rows, self._seal)
        self._under_way.append((first, used, sums))
        self._wait_for_all_but(_MOST_UNDER_WAY)

    def written(self) -> list[WrittenBlock]:
        """All blocks, once they are; not all of them where it ``has_failed``."""
        self._wait_for_all_but(0)
        return self._written

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _wait_for_all_but(self, count: int) -> None:
        while len(self._under_way) > count:
            first, used, sums = self._under_way.popleft()
            try:
                self._written.append(WrittenBlock(first, sums.result(), used))
            except OSError:
                self.has_failed = True
