"""The sizes of a split's images, and which of them are extreme."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

# A ResNet halves an image five times: of a side this small nothing is left, and a crop of a strip
# this narrow is mostly what was stretched.
SMALL_SIDE = 8
EXTREME_ASPECT = 8.0
MOST_LISTED = 1000


class SizeTable:
    """Counts widths and heights; remembers the first extreme images by number."""

    def __init__(self) -> None:
        self.num_decoded = 0
        self.num_extreme = 0
        self.extreme: list[tuple[int, int, int]] = []
        """(sample, width, height)"""
        self._sides = Counter[int](), Counter[int]()

    def add(self, samples: np.ndarray, sizes: np.ndarray) -> None:
        """``sizes`` (n, 2): width and height, 0 for what was not decoded."""
        decoded = sizes[:, 0] > 0
        samples, sizes = samples[decoded], sizes[decoded]
        self.num_decoded += len(samples)
        for counter, side in zip(self._sides, sizes.T, strict=True):
            values, counts = np.unique(side, return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if not len(samples):
            return
        small, large = sizes.min(axis=1), sizes.max(axis=1)
        found = np.flatnonzero((small < SMALL_SIDE) | (large > EXTREME_ASPECT * small))
        self.num_extreme += len(found)
        for i in found[: MOST_LISTED - len(self.extreme)]:
            self.extreme.append((int(samples[i]), int(sizes[i, 0]), int(sizes[i, 1])))

    def to_json(self) -> dict[str, Any]:
        return {"width": _spread(self._sides[0]), "height": _spread(self._sides[1])}


def _spread(counter: Counter[int]) -> dict[str, int] | None:
    """Smallest, median (the lower of the middle two) and largest; None: there is none."""
    if not counter:
        return None
    values = sorted(counter)
    reached = np.cumsum([counter[value] for value in values])
    middle = int(np.searchsorted(reached, (reached[-1] + 1) // 2))
    return {"min": values[0], "median": values[middle], "max": values[-1]}
