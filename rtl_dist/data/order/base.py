"""A training stream: which sample is at which position, and which shards that needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_MOST_LOOKS = 256
_LOOKAHEAD = 4096  # positions looked through at a time for the shards they need


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStream(ABC):
    """Which sample is at which position, over a split's shards: a pure function, never a list, so
    that the loader's state is one integer. Its epochs are as many positions as there are samples;
    step ``t`` takes positions ``[t * B, (t + 1) * B)`` for a global batch of B.
    """

    shard_sizes: np.ndarray
    """int64 (num_shards,): samples of each shard, which the index holds in order."""
    seed: int
    """The run's, 0 to 2^63 - 1."""

    @property
    def num_samples(self) -> int:
        return int(self._first_of_shard[-1])

    @abstractmethod
    def samples_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream's ``count`` positions from ``first`` on.

        Returns:
            samples, and how often each came before this position, each int64 (count,).
        """

    @abstractmethod
    def most_shards_at_once(self) -> int:
        """How many shards a cache must hold so that none is fetched twice an epoch."""

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The shard, int64 (n,), that holds each of ``samples``."""
        return np.searchsorted(self._first_of_shard, samples, side="right") - 1

    def shards_ahead(self, position: int) -> Iterator[int]:
        """Every shard once, in the order in which the stream from ``position`` on needs them; the
        rarest, which a long look did not meet, last and by number."""
        seen = self.shard_sizes == 0
        count = min(_LOOKAHEAD, self.num_samples)
        looks = 0
        while not seen.all() and looks < self._most_looks:
            looks += 1
            shards = self.shards_of(self.samples_at(position, count)[0])
            shards, first_seen = np.unique(shards, return_index=True)
            shards = shards[np.argsort(first_seen)]
            yield from shards[~seen[shards]].tolist()
            seen[shards] = True
            position = self._next_unseen(position + count, seen)
        yield from np.flatnonzero(~seen).tolist()

    @cached_property
    def _first_of_shard(self) -> np.ndarray:
        """int64 (num_shards + 1,), the sample with which each shard begins; at last the end."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes, dtype=np.int64)])

    @property
    def _most_looks(self) -> float:
        return _MOST_LOOKS

    def _next_unseen(self, position: int, seen: np.ndarray) -> int:
        """``position``, or a later one up to which the stream needs only shards that were seen."""
        return position


class ExactEpochs(TrainingStream):
    """A stream that is one permutation of all samples after another, an epoch each."""

    def samples_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(first, first + count, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_samples)
        samples = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            samples[chosen] = self._of_epoch(epoch, within[chosen])
        return samples, epochs

    @abstractmethod
    def _of_epoch(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """The samples, int64 (n,), at the positions ``within``, int64 (n,), of an epoch."""
