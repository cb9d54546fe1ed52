"""Which sample comes at which position of the training stream: a pure function, never a list.

``Order``'s stream is the concatenation of one permutation an epoch. Position ``p`` is sample
``permutation(seed, p // N)(p % N)``; step ``t`` takes positions ``[t * B, (t + 1) * B)``. A
permutation is a keyed Feistel network over the next even power of two, with cycle walking for
values outside ``[0, N)`` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), so any
position of any epoch of any number of samples costs the same and the loader's state is one integer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rtl_dist.core.keys import _GOLDEN, derive_key, mix64
from rtl_dist.data.order.base import _MOST_LOOKS, TrainingStream
from rtl_dist.data.order.permutation import permute, permute_each

# Far from the small numbers that key other streams and epochs, so that no two keys are derived
# from the same numbers.
_SHARD_STREAM, _BLOCK_STREAM, _GROUP_STREAM = 1 << 40, 2 << 40, 3 << 40
_EPOCHS_KEPT = 2  # a batch may lie in two


@dataclass(frozen=True, eq=False)
class Order(TrainingStream):
    """The stream that has every sample once an epoch.

    With ``window`` None each epoch is one permutation of all samples. Otherwise the samples of
    about 4/3 ``window`` shards are mixed at a time (see ``_Plan``), and 2 ``window`` shards are
    enough to read on from one such mixture into the next, so a cache may be much smaller than the
    data. Where the data lies, and what is cached of it, never matters to either.
    """

    window: int | None = None

    def samples_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(first, first + count, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_samples)
        samples = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            samples[chosen] = self._of_epoch(epoch, within[chosen])
        return samples, epochs

    def most_shards_at_once(self) -> int:
        num_shards = len(self.shard_sizes)
        return num_shards if self.window is None else min(num_shards, 2 * self.window)

    @property
    def _most_looks(self) -> float:
        return _MOST_LOOKS if self.window is None else math.inf

    def _of_epoch(self, epoch: int, within: np.ndarray) -> np.ndarray:
        if self.window is None:
            key = derive_key(self.seed, epoch)
            return permute(within, num_samples=self.num_samples, key=key)
        plan = self._plan(epoch)
        key = derive_key(self.seed, _GROUP_STREAM, epoch)
        within = _permute_pieces(within, plan.groups, key)
        key = derive_key(self.seed, _BLOCK_STREAM, epoch)
        within = _permute_pieces(within, plan.starts[plan.blocks], key)
        place = np.searchsorted(plan.starts, within, side="right") - 1
        return self._first_of_shard[plan.shards[place]] + within - plan.starts[place]

    def _next_unseen(self, position: int, seen: np.ndarray) -> int:
        # the end of the group if all shards of that have been seen
        if self.window is None:
            return position
        epoch, within = divmod(position, self.num_samples)
        plan = self._plan(epoch)
        group = int(np.searchsorted(plan.groups, within, side="right")) - 1
        if not seen[plan.shards_of_group(group)].all():
            return position
        return epoch * self.num_samples + int(plan.groups[group + 1])

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            assert self.window is not None
            key = derive_key(self.seed, _SHARD_STREAM, epoch)
            self._plans[epoch] = _make_plan(self.shard_sizes, self.window, key)
            if len(self._plans) > _EPOCHS_KEPT:
                self._plans.pop(next(iter(self._plans)))
        return self._plans[epoch]

    @cached_property
    def _plans(self) -> dict[int, _Plan]:
        return {}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the window order mixes one epoch.

    The shards are dealt into blocks. The samples of each block are permuted; then those of each
    group, which reaches from the middle of one block to the middle of the next. So a group mixes
    two blocks, and two groups in a row need three. The first and the last block are half as large
    as the others, and their groups take them whole: from the last group of an epoch to the first
    of the next, too, no more shards are needed.
    """

    shards: np.ndarray
    """int64 (num_shards,), in the order of the epoch."""
    starts: np.ndarray
    """int64 (num_shards + 1,): where each of ``shards`` starts, in samples; at last the end."""
    blocks: np.ndarray
    """int64 (num_blocks + 1,): the place in ``shards`` where each block starts, and the end."""
    groups: np.ndarray
    """int64 (num_groups + 1,): where each group starts, in samples; at last the end."""

    def shards_of_group(self, group: int) -> np.ndarray:
        end = min(group + 2, len(self.blocks) - 1)
        return self.shards[self.blocks[group] : self.blocks[end]]


def _make_plan(shard_sizes: np.ndarray, window: int, key: int) -> _Plan:
    num_shards = len(shard_sizes)
    shards = _spread(num_shards, num_strata=-(-2 * window // 3), key=key)
    starts = np.concatenate([[0], np.cumsum(shard_sizes[shards], dtype=np.int64)])
    halves = -(-3 * num_shards // window)  # half blocks, of which six have at most 2 window shards
    halves += halves % 2
    if halves <= 6:
        blocks = np.array([0, num_shards])
    else:
        bounds = np.arange(halves + 1) * num_shards // halves
        blocks = np.concatenate([bounds[:1], bounds[1::2], bounds[-1:]])
    ends = starts[blocks]
    middles = (ends[1:-2] + ends[2:-1]) // 2
    groups = np.concatenate([ends[:1], middles, ends[-1:]])
    return _Plan(shards=shards, starts=starts, blocks=blocks, groups=groups)


def _spread(num_shards: int, *, num_strata: int, key: int) -> np.ndarray:
    """The numbers below ``num_shards`` in an order of which any ``num_strata`` in a row are about
    one from each of as many equal ranges. Where neighbouring shards are alike, as in shards sorted
    by class, such a run is more like the whole than one drawn at random."""
    num_strata = min(num_strata, num_shards)
    numbers = np.arange(num_shards)
    bounds = np.arange(num_strata + 1) * num_shards // num_strata
    strata = np.searchsorted(bounds, numbers, side="right") - 1
    draws = mix64(np.uint64(key) + numbers.astype(np.uint64) * _GOLDEN)
    shuffled = np.lexsort((draws, strata))  # each stratum in its own places
    rank = np.empty_like(numbers)
    rank[shuffled] = numbers - bounds[strata]
    # a stratum of m shards has one, anywhere, in each m-th part of the epoch
    jitter = mix64(draws) / 2.0**64
    return np.argsort((rank + jitter) / np.diff(bounds)[strata], kind="stable")


def _permute_pieces(positions: np.ndarray, bounds: np.ndarray, key: int) -> np.ndarray:
    """The images of ``positions``, int64 (n,), when each piece ``[bounds[i], bounds[i + 1])`` is
    permuted within itself by a key of its own."""
    pieces = np.searchsorted(bounds, positions, side="right") - 1
    first = bounds[pieces]
    keys = mix64(np.uint64(key) + pieces.astype(np.uint64) * _GOLDEN)
    return first + permute_each(positions - first, sizes=bounds[pieces + 1] - first, keys=keys)
