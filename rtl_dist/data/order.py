"""Which sample comes at which position of the training stream: a pure function, never a list.

The stream is the concatenation of one permutation an epoch. Position ``p`` is sample
``permutation(seed, p // N)(p % N)``; step ``t`` takes positions ``[t * B, (t + 1) * B)``. The
permutation is a keyed Feistel network over the next even power of two, with cycle walking for
values outside ``[0, N)`` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), so any
position of any epoch of any number of samples costs the same and the loader's state is one integer.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


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


def samples_at(
    first: int, count: int, *, num_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The stream's ``count`` positions from ``first`` on.

    Returns:
        samples and their epochs, each int64 (count,).
    """
    positions = np.arange(first, first + count, dtype=np.int64)
    epochs, within = np.divmod(positions, num_samples)
    samples = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        samples[chosen] = permute(
            within[chosen], num_samples=num_samples, key=derive_key(seed, int(epoch))
        )
    return samples, epochs


def _feistel(value: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = value >> shift, value & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix64(right + round_key) & mask)
    return (left << shift) | right
