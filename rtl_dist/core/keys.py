"""Keys of random streams: 64-bit numbers derived from whole numbers."""

from __future__ import annotations

import numpy as np

_MASK_64 = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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
