"""The full shuffle: one permutation of all samples an epoch, whatever shards they lie in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtl_dist.core.keys import Stream, stream_key
from rtl_dist.data.order.base import ExactEpochs
from rtl_dist.data.order.permutation import permute


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochOrder(ExactEpochs):
    """Position ``p`` is sample ``permutation(seed, p // N)(p % N)``.

    Any position of any epoch of any number of samples costs the same; see ``permute``.
    """

    def most_shards_at_once(self) -> int:
        return len(self.shard_sizes)

    def _of_epoch(self, epoch: int, within: np.ndarray) -> np.ndarray:
        key = stream_key(self.seed, Stream.EPOCH_ORDER, epoch)
        return permute(within, num_samples=self.num_samples, key=key)
