"""How unequal the classes are, and how far their shares differ from split to split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

TRAIN = "train"


@dataclass(frozen=True, kw_only=True)
class SplitSkew:
    """One split's classes. In multi-label data a share is the part of samples with that label."""

    counts: tuple[int, ...]
    """Samples of each class."""
    num_samples: int
    """Of the split."""
    absent: tuple[int, ...]
    """Numbers of the classes without a sample."""
    ratio: float | None
    """The largest class over the smallest that has any sample; None: there is no sample."""
    distance: float | None
    """From train. Single-label: the total variation distance, half the sum of the differences of
    shares; multi-label: the largest difference of a label's share. None: this is train, or there
    is no train."""
    by_chance: float | None
    """About what ``distance`` would be were both splits drawn from the same classes."""

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": list(self.counts),
            "absent": list(self.absent),
            "largest_to_smallest": _rounded(self.ratio),
            "distance_from_train": _rounded(self.distance),
            "distance_by_chance": _rounded(self.by_chance),
        }


def measure_skew(
    counts: dict[str, list[int]], num_samples: dict[str, int], *, multi_label: bool
) -> dict[str, SplitSkew]:
    """The skew of each split, from its class counts."""
    result = {}
    for split, of_class in counts.items():
        there = [count for count in of_class if count]
        distance = by_chance = None
        if split != TRAIN and TRAIN in counts and num_samples[split] and num_samples[TRAIN]:
            distance, by_chance = _distance(
                np.array(of_class) / num_samples[split],
                np.array(counts[TRAIN]) / num_samples[TRAIN],
                1 / num_samples[split] + 1 / num_samples[TRAIN],
                multi_label,
            )
        result[split] = SplitSkew(
            counts=tuple(of_class),
            num_samples=num_samples[split],
            absent=tuple(n for n, count in enumerate(of_class) if not count),
            ratio=max(there) / min(there) if there else None,
            distance=distance,
            by_chance=by_chance,
        )
    return result


def _distance(
    shares: np.ndarray, train: np.ndarray, variance: float, multi_label: bool
) -> tuple[float, float]:
    differences = np.abs(shares - train)
    pooled = (shares + train) / 2
    # the mean size of a normal deviation is sqrt(2 / pi) of its standard deviation
    chance = np.sqrt(2 / np.pi * variance * pooled * (1 - pooled).clip(min=0))
    if multi_label:
        return float(differences.max()), float(chance.max())
    return float(differences.sum() / 2), float(chance.sum() / 2)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
