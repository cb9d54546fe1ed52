"""What each pixel of an enlarged line is made of: torch's resize of uint8 on a CPU, to the bit.

torch (``UpSampleKernel.cpp``, after Pillow's) works in whole numbers, which come out the same
anywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

TAPS = 2  # source pixels of one pixel of an enlarged line
# Weights are in units of 2^-BITS: as many as fit 16 with the sign, where the largest is 1, which it
# is at both ends of every enlarged line.
BITS = 14


class Taps(NamedTuple):
    """What each of S pixels is made of."""

    first: np.ndarray
    """int64 (S,): its first source pixel."""
    weights: np.ndarray
    """int32 (2, S): of that one and the next (0 where there is no next), in units of 2^-BITS."""


@lru_cache(maxsize=1024)
def taps(size: int, enlarged: int, start: int, count: int) -> Taps:
    """Of ``count`` pixels from ``start`` on, of a line of ``size`` pixels that becomes ``enlarged``
    (more): a triangle around the pixel's centre, normalised."""
    centres = (np.arange(start, start + count) + 0.5) * (size / enlarged)
    first = np.maximum((centres - 0.5).astype(np.int64), 0)
    number = np.minimum((centres + 1.5).astype(np.int64), size) - first
    offsets = first[None] + np.arange(TAPS)[:, None]
    weights = np.maximum(0.0, 1.0 - np.abs(offsets - centres[None] + 0.5))
    weights[np.arange(TAPS)[:, None] >= number[None]] = 0
    weights /= weights.sum(axis=0)
    return Taps(first, (weights * (1 << BITS) + 0.5).astype(np.int32))
