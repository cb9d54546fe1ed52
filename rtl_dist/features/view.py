"""What frozen parts make of every image of a split, once: how large it is, and how it is read."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO, cast

import numpy as np
import torch

_OF_ACTIVATIONS = 3  # dimensions of a row


@dataclass(frozen=True, kw_only=True)
class ViewShape:
    """How large a view is."""

    num_samples: int
    """Rows, one an image."""
    row: tuple[int, ...]
    """Shape of what the frozen part makes of one image."""
    dtype: torch.dtype
    """Of a row's values; a floating point one."""
    block_size: int
    """Rows that are computed, written and checked together; the last block may have fewer."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_samples * (self.row_bytes + 8)


@dataclass(frozen=True, kw_only=True)
class View:
    """A whole view, mapped from disk."""

    features: torch.Tensor
    """(num_samples, ...) in the precision that the frozen part has, on the host; what is changed in
    it changes no file. Of activations it is channels-last."""
    used: torch.Tensor
    """int64 (num_samples,): the sample that each row really is of, another one where a damaged
    sample was replaced."""
    bad: list[str]
    """What each damaged sample suffers from."""
    mapping: mmap.mmap | None = field(default=None, repr=False)
    """That the features lie in; None of one in memory."""

    def will_be_read_at_random(self) -> None:
        """Has the disk bring what is asked for and nothing besides: of a view larger than memory,
        what is read ahead (128 KiB, on some disks 8 MiB) is gone before it is used."""
        if self.mapping is not None and hasattr(mmap, "MADV_RANDOM"):
            self.mapping.madvise(mmap.MADV_RANDOM)

    def ask_for(self, samples: np.ndarray) -> None:
        """Has the disk bring the rows of samples that are about to be copied, at once. One after
        the other, and page by page where they are read at random, they would mostly be waited for.

        Args:
            samples: int64 (n,).
        """
        if self.mapping is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        size = self.rows.shape[1]
        for start in (samples * size).tolist():
            page = start - start % mmap.PAGESIZE
            self.mapping.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    @cached_property
    def rows(self) -> np.ndarray:
        """uint8 (num_samples, bytes), the features of each image as they lie in memory."""
        stored = as_stored(self.features)
        raw: np.ndarray = stored.view(len(stored), -1).view(torch.uint8).numpy()
        return raw


def map_features(file: BinaryIO, shape: ViewShape) -> tuple[mmap.mmap, torch.Tensor]:
    """The features that lie in a file, and the map of it; see ``View``."""
    # copy on write: torch has no read-only tensors
    flat = np.memmap(file, dtype=np.uint8, mode="c")
    stored = torch.from_numpy(flat)[: shape.num_samples * shape.row_bytes]
    features = as_features(stored.view(shape.num_samples, -1), shape.row, shape.dtype)
    return cast(mmap.mmap, flat.base), features


def as_features(rows: torch.Tensor, row: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What rows of a view's bytes are: (n, ...) in the same memory.

    Args:
        rows: uint8 (n, bytes).
        row: see ``ViewShape``.
    """
    values = rows.view(dtype)
    if len(row) != _OF_ACTIVATIONS:
        return values.view(len(rows), *row)
    channels, height, width = row
    return values.view(len(rows), height, width, channels).permute(0, 3, 1, 2)


def as_stored(features: torch.Tensor) -> torch.Tensor:
    """The same values in the order in which they lie in a file."""
    if features.ndim == 1 + _OF_ACTIVATIONS:
        features = features.permute(0, 2, 3, 1)
    return features.contiguous()
