"""Keyed permutations: the image of any position, at the same cost everywhere."""

from __future__ import annotations

import numpy as np

from rtl_dist.core.keys import GOLDEN, mix64

_ROUNDS = 6


def permute(positions: np.ndarray, *, num_samples: int, key: int) -> np.ndarray:
    """The images of ``positions`` under the permutation of ``[0, num_samples)`` that ``key`` names.

    A keyed Feistel network over the next even power of two, with cycle walking for values outside
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        positions: int64 (n,), each in ``[0, num_samples)``.

    Returns:
        int64 (n,).
    """
    half_bits = max(1, (max(1, num_samples - 1).bit_length() + 1) // 2)
    round_keys = mix64(np.uint64(key) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * GOLDEN)
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
    round_keys = mix64(keys + rounds * GOLDEN)
    result = values.astype(np.uint64)
    todo = np.arange(len(result))
    while todo.size:
        result[todo] = _add_rounds(result[todo], width[todo], height[todo], round_keys[:, todo])
        todo = todo[result[todo] >= limits[todo]]
    return result.astype(np.int64)


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
