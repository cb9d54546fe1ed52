"""Samples of a split read for one batch; another stands for each that is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from rtl_dist.core.errors import DataError, ShardError
from rtl_dist.core.keys import mix64
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.format.split import Split
from rtl_dist.data.loading.batch import Batch
from rtl_dist.data.loading.prefetch import Prefetcher

Put = Callable[[int, bytes, int], None]  # (place in the batch, image file, augmentation key)

_MAX_SUBSTITUTIONS = 16  # a split in which this many draws in a row are damaged is not one


class BatchReader:
    """Reads samples for whoever decodes and places them; opens files in whichever process uses
    it."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._reader = SampleReader(split)
        self._prefetcher: Prefetcher | None = None

    def prefetch(self, position: int, shards_ahead: Callable[[int], Iterator[int]]) -> None:
        """Has remote shards come in the background, in the order in which they will be needed."""
        if not self._split.is_remote:
            return
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._split, shards_ahead)
        self._prefetcher.advance(position)

    def read(self, samples: np.ndarray, keys: np.ndarray, put: Put, *, substitute: bool) -> Batch:
        """A batch whose inputs are for the caller to add: ``put`` decodes each sample's file and
        places it. Without ``substitute`` nothing is put for a damaged sample."""
        if self._split.is_remote:  # several remote shards come at once
            shards = {self._split.row(sample)[0] for sample in samples.tolist()}
            self._split.files.fetch(sorted(shards))
        used, bad = samples.copy(), []
        for i, (sample, key) in enumerate(zip(samples.tolist(), keys.tolist(), strict=True)):
            try:
                put(i, self._reader.read(sample), key)
            except ShardError:
                raise  # the whole shard's fault: no other sample can stand for it
            except DataError as error:
                bad.append(self._name_fault(sample, error))
                if substitute:
                    used[i] = self._substitute(i, sample, key, put, bad)
        labels = torch.from_numpy(self._split.labels(used))
        return Batch(torch.empty(0), labels, torch.from_numpy(used), bad)

    def _substitute(self, i: int, sample: int, key: int, put: Put, bad: list[str]) -> int:
        """Another sample, chosen by the damaged one's number alone, so the same at any W."""
        draw = np.array([sample], dtype=np.uint64)
        for _ in range(_MAX_SUBSTITUTIONS):
            draw = mix64(draw + np.uint64(0x9E3779B97F4A7C15))
            other = int(draw[0] % np.uint64(self._split.num_samples))
            try:
                put(i, self._reader.read(other), key)
            except ShardError:
                raise
            except DataError as error:
                bad.append(self._name_fault(other, error))
            else:
                return other
        raise DataError(
            f"{_MAX_SUBSTITUTIONS} samples in a row cannot be read, the last: {bad[-1]}; run"
            " `rtl-dist pack` again"
        )

    def _name_fault(self, sample: int, error: DataError) -> str:
        text = str(error)
        if text.startswith("sample "):
            return text
        return f"{self._split.describe(sample)} {text}"
