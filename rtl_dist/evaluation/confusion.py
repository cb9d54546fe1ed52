"""Which classes are taken for which, in counts that do not grow with classes squared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtl_dist.evaluation.predictions import Predictions


@dataclass(frozen=True, kw_only=True, eq=False)
class Confusion:
    """The cells of a single-label confusion matrix that are not 0, row by row."""

    num_classes: int
    """C: the matrix has as many rows, of the truth, as columns, of the predictions."""
    truth: np.ndarray
    """int64 (cells,): the row of each."""
    predicted: np.ndarray
    """int64 (cells,): the column of each."""
    counts: np.ndarray
    """int64 (cells,): the samples in each, at least 1."""

    @property
    def num_samples(self) -> np.ndarray:
        """Of each class, int64 (C,)."""
        return self._sums(self.truth, self.counts)

    @property
    def num_predicted(self) -> np.ndarray:
        """Samples said to be of each class, int64 (C,)."""
        return self._sums(self.predicted, self.counts)

    @property
    def hits(self) -> np.ndarray:
        """Samples of each class that are said to be of it, int64 (C,)."""
        return self._sums(self.truth, np.where(self.truth == self.predicted, self.counts, 0))

    @property
    def shares(self) -> np.ndarray:
        """Of each cell among the samples of its true class, float64 (cells,)."""
        return self.counts / self.num_samples[self.truth]

    def matrix(self) -> np.ndarray:
        """All cells, int64 (C, C): for few classes."""
        full = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        full[self.truth, self.predicted] = self.counts
        return full

    def _sums(self, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        # as floats, which are exact below 2**53
        return np.bincount(classes, counts, self.num_classes).astype(np.int64)


def confusion_of(predictions: Predictions) -> Confusion:
    """Of single-label predictions."""
    size = len(predictions.classes)
    cells, counts = np.unique(predictions.labels * size + predictions.predicted, return_counts=True)
    return Confusion(num_classes=size, truth=cells // size, predicted=cells % size, counts=counts)
