"""The shuffle within windows of shards: a cache much smaller than the data serves it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rtl_dist.core.keys import GOLDEN, Stream, mix64, stream_key
from rtl_dist.data.order.base import ExactEpochs
from rtl_dist.data.order.permutation import permute_each

_EPOCHS_KEPT = 2  # a batch may lie in two


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowOrder(ExactEpochs):
    """The samples of about 4/3 ``window`` shards are mixed at a time (see ``_Plan``), and 2
    ``window`` shards are enough to read on from one such mixture into the next. Where the data
    lies, and what is cached of it, never matters to the order.
    """

    window: int
    """Half the shards that a cache must hold; at least 1."""

    def most_shards_at_once(self) -> int:
        return min(len(self.shard_sizes), 2 * self.window)

    @property
    def _most_looks(self) -> float:
        return math.inf  # each goes on behind a group that was seen, so they are few

    def _of_epoch(self, epoch: int, within: np.ndarray) -> np.ndarray:
        plan = self._plan(epoch)
        key = stream_key(self.seed, Stream.WINDOW_GROUPS, epoch)
        within = _permute_pieces(within, plan.groups, key)
        key = stream_key(self.seed, Stream.WINDOW_BLOCKS, epoch)
        within = _permute_pieces(within, plan.starts[plan.blocks], key)
        place = np.searchsorted(plan.starts, within, side="right") - 1
        return self._first_of_shard[plan.shards[place]] + within - plan.starts[place]

    def _next_unseen(self, position: int, seen: np.ndarray) -> int:
        # the end of the group if all shards of that have been seen
        epoch, within = divmod(position, self.num_samples)
        plan = self._plan(epoch)
        group = int(np.searchsorted(plan.groups, within, side="right")) - 1
        if not seen[plan.shards_of_group(group)].all():
            return position
        return epoch * self.num_samples + int(plan.groups[group + 1])

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            key = stream_key(self.seed, Stream.WINDOW_SHARDS, epoch)
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
    draws = mix64(np.uint64(key) + numbers.astype(np.uint64) * GOLDEN)
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
    keys = mix64(np.uint64(key) + pieces.astype(np.uint64) * GOLDEN)
    return first + permute_each(positions - first, sizes=bounds[pieces + 1] - first, keys=keys)
