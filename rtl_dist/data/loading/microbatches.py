"""Images of a microbatch: a range of the training stream, or of a split in its own order.

What one holds depends on its position alone: the caller asks for its own rank's, and whichever
process makes one makes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import TrainTransform, Transform, augmentation_keys
from rtl_dist.data.images.tiny import TinyBatch, TinyView, gather_tiny
from rtl_dist.data.loading.batch import Batch
from rtl_dist.data.loading.batch_reader import BatchReader, Put
from rtl_dist.data.order.base import TrainingStream


class TrainingMicrobatches(TorchDataset[Batch]):
    """``dataset[p]`` is the microbatch at positions ``[p, p + size)`` of the training stream."""

    def __init__(
        self,
        split: Split,
        transform: TrainTransform,
        *,
        order: TrainingStream,
        size: int,
        views: int | None,
    ) -> None:
        self._reader, self._transform = BatchReader(split), transform
        self._order, self._size, self._views = order, size, views
        self.shape = (size, transform.channels, transform.image_size, transform.image_size)
        self.label_bytes = split.label_bytes

    def __getitem__(self, position: int) -> Batch:
        return self.fill(position, torch.empty(self.shape, dtype=torch.uint8))

    def fill(self, position: int, out: torch.Tensor) -> Batch:
        """See ``Microbatches``."""
        return self._read(position, _putting(self._transform, out))._replace(inputs=out)

    def fill_tiny(self, position: int, out: torch.Tensor) -> tuple[Batch, TinyBatch] | None:
        """See ``Microbatches``."""
        views: dict[int, TinyView] = {}

        def tiny_view(content: bytes, key: int) -> TinyView:
            view = self._transform.tiny(content, key)
            if view is None:
                raise _NotTinyError
            return view

        try:
            batch = self._read(position, _putting(tiny_view, views))
        except _NotTinyError:
            return None
        return batch, gather_tiny([views[i] for i in range(self._size)], out)

    def _read(self, position: int, put: Put) -> Batch:
        samples, epochs = self._order.samples_at(position, self._size)
        keys = augmentation_keys(samples, epochs, seed=self._order.seed, views=self._views)
        batch = self._reader.read(samples, keys, put, substitute=True)
        self._reader.prefetch(position + self._size, self._order.shards_ahead)
        return batch


class SplitMicrobatches(TorchDataset[Batch]):
    """``dataset[i]`` holds samples ``[i, i + size)`` of a split in its own order.

    With ``seed`` and ``view``, the samples are augmented as training would in that view; the last
    block is then filled up from the start of the split, so that every block is full.

    substitute: another sample takes the place of a damaged one; else it is left black.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        *,
        size: int,
        seed: int = 0,
        view: int | None = None,
        substitute: bool = False,
    ) -> None:
        self._reader, self._transform = BatchReader(split), transform
        self._substitute = substitute
        self._split, self._size, self._seed, self._view = split, size, seed, view
        self.shape = (size, transform.channels, transform.image_size, transform.image_size)
        self.label_bytes = split.label_bytes

    def __getitem__(self, first: int) -> Batch:
        return self.fill(first, torch.empty(self.shape, dtype=torch.uint8))

    def fill(self, first: int, out: torch.Tensor) -> Batch:
        """See ``Microbatches``."""
        num_samples = self._split.num_samples
        last = first + self._size
        if self._view is None:
            samples = np.arange(first, min(last, num_samples), dtype=np.int64)
            keys = np.zeros_like(samples)
        else:
            samples = np.arange(first, last, dtype=np.int64) % num_samples
            epochs = np.full_like(samples, self._view)
            keys = augmentation_keys(samples, epochs, seed=self._seed, views=None)
        out[:] = 0  # what cannot be read is left black
        put = _putting(self._transform, out)
        batch = self._reader.read(samples, keys, put, substitute=self._substitute)
        self._reader.prefetch(last, self._shards_from)
        return batch._replace(inputs=out[: len(samples)])

    def fill_tiny(self, first: int, out: torch.Tensor) -> None:
        """The views of a split are enlarged by the workers."""

    def _shards_from(self, sample: int) -> Iterator[int]:
        first = self._split.row(min(sample, self._split.num_samples - 1))[0]
        return iter(range(first, len(self._split.shards)))


def microbatch_positions(
    first_step: int,
    end_step: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[int]:
    """The stream positions of the microbatches of one rank, in the order it trains on them.

    Of a step's K microbatches, rank r takes the r-th of W equal runs.
    """
    per_rank = global_batch_size // micro_batch_size // world_size
    for step in range(first_step, end_step):
        for microbatch in range(rank * per_rank, (rank + 1) * per_rank):
            yield step * global_batch_size + microbatch * micro_batch_size


class _NotTinyError(Exception):
    """An image is too large to travel as it is."""


def _putting(view: Callable[[bytes, int], Any], places: torch.Tensor | dict[int, TinyView]) -> Put:
    """Puts the ``view`` of each image file into its place."""

    def put(i: int, content: bytes, key: int) -> None:
        places[i] = view(content, key)

    return put
