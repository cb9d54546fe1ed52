"""Which sample comes at which position of the training stream: a pure function, never a list.

``Order``'s stream is the concatenation of one permutation an epoch. Position ``p`` is sample
``permutation(seed, p // N)(p % N)``; step ``t`` takes positions ``[t * B, (t + 1) * B)``. A
permutation is a keyed Feistel network over the next even power of two, with cycle walking for
values outside ``[0, N)`` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), so any
position of any epoch of any number of samples costs the same and the loader's state is one integer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1
# Far from the small numbers that key other streams and epochs, so that no two keys are derived
# from the same numbers.
_SHARD_STREAM, _BLOCK_STREAM, _GROUP_STREAM = 1 << 40, 2 << 40, 3 << 40
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MOST_LOOKS = 256
_LOOKAHEAD = 4096  # positions looked through at a time for the shards they need
_EPOCHS_KEPT = 2  # a batch may lie in two


def mix64(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): uint64 to mixed uint64, elementwise."""
    value = value.astype(np.uint64, copy=True)
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def derive_key(*parts: int) -> int:
    """A 64-bit key from whole numbers; different numbers, or another order, give another key."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK_64)) & _MASK_64
        state = int(mix64(np.array([(state + 0x9E3779B97F4A7C15) & _MASK_64], np.uint64))[0])
    return state


def derive_keys(key: int, *parts: np.ndarray) -> np.ndarray:
    """``derive_key`` of the numbers that gave ``key`` and then, elementwise, of ``parts``.

    Args:
        parts: int64 (n,) each.

    Returns:
        uint64 (n,).
    """
    keys = np.array([key], dtype=np.uint64)
    for part in parts:
        keys = mix64((keys ^ part.astype(np.uint64)) + _GOLDEN)
    return keys


def permute(positions: np.ndarray, *, num_samples: int, key: int) -> np.ndarray:
    """The images of ``positions`` under the permutation of ``[0, num_samples)`` that ``key`` names.

    Args:
        positions: int64 (n,), each in ``[0, num_samples)``.

    Returns:
        int64 (n,).
    """
    half_bits = max(1, (max(1, num_samples - 1).bit_length() + 1) // 2)
    round_keys = mix64(
        np.uint64(key) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    result = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(result >= num_samples)
    while outside.size:  # walk each cycle until it is back inside; at most 4 rounds on average
        result[outside] = _feistel(result[outside], half_bits, round_keys)
        outside = outside[result[outside] >= num_samples]
    return result.astype(np.int64)


def permute_each(values: np.ndarray, *, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The image of each value under a permutation of its own: of ``[0, size)``, named by its key.

    This Feistel network adds within a rectangle that just holds the range (Black & Rogaway's
    generalised one) instead of a square with a power of two on its side, so hardly any value has to
    walk: two of these cost no more than one of ``permute``.

    Args:
        values, sizes: int64 (n,), each value in ``[0, size)``.
        keys: uint64 (n,).

    Returns:
        int64 (n,).
    """
    limits = sizes.astype(np.uint64)
    width = np.ceil(np.sqrt(limits)).astype(np.uint64)
    height = (limits + width - np.uint64(1)) // width
    rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None]
    round_keys = mix64(keys + rounds * _GOLDEN)
    result = values.astype(np.uint64)
    todo = np.arange(len(result))
    while todo.size:
        result[todo] = _add_rounds(result[todo], width[todo], height[todo], round_keys[:, todo])
        todo = todo[result[todo] >= limits[todo]]
    return result.astype(np.int64)


@dataclass(frozen=True, eq=False)
class TrainingStream(ABC):
    """Which sample is at which position, over a split's shards. Its epochs are as many positions
    as there are samples.

    Args:
        shard_sizes: int64 (num_shards,), samples of each shard, which the index holds in order.
    """

    shard_sizes: np.ndarray
    seed: int

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
        return np.concatenate([[0], np.cumsum(self.shard_sizes, dtype=np.int64)])

    @property
    def _most_looks(self) -> float:
        return _MOST_LOOKS

    def _next_unseen(self, position: int, seen: np.ndarray) -> int:
        """``position``, or a later one up to which the stream needs only shards that were seen."""
        return position


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


def _add_rounds(
    value: np.ndarray, width: np.ndarray, height: np.ndarray, round_keys: np.ndarray
) -> np.ndarray:
    column, row = np.divmod(value, height)
    for i in range(0, _ROUNDS, 2):
        # 63 bits, so that no sum overflows: modulo 2^64 it would not be one to one
        column = (column + (mix64(row + round_keys[i]) >> np.uint64(1))) % width
        row = (row + (mix64(column + round_keys[i + 1]) >> np.uint64(1))) % height
    return column * height + row


def _feistel(value: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = value >> shift, value & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix64(right + round_key) & mask)
    return (left << shift) | right
