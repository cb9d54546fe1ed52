"""How far stated probabilities come true."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.evaluation.predictions import Predictions, blocks_of_rows

NUM_BINS = 15


@dataclass(frozen=True, kw_only=True, eq=False)
class Reliability:
    """A reliability diagram of B bins."""

    edges: np.ndarray
    """float64 (B + 1,): the bounds of the bins, 0 to 1."""
    counts: np.ndarray
    """int64 (B,): how many predictions fell into each bin."""
    confidence: np.ndarray
    """float64 (B,): their mean stated probability; NaN in empty bins."""
    accuracy: np.ndarray
    """float64 (B,): the share of them that came true; NaN in empty bins."""
    ece: float
    """Expected calibration error: the mean distance of the two over all predictions, 0 to 1."""


def reliability(predictions: Predictions, num_bins: int = NUM_BINS) -> Reliability:
    """Confidence against accuracy in equal bins ``(low, high]`` (Guo et al. 2017).

    Single-label: the predicted class's probability against whether it is right, over samples.
    Multi-label: each class's probability against its presence, over samples and classes.
    """
    if predictions.task == MULTI_LABEL:
        confidence, right = predictions.of_multi_label.ravel(), predictions.labels.ravel()
    else:
        confidence = predictions.of_single_label.confidence
        right = predictions.predicted == predictions.labels
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    counts = np.zeros(num_bins, dtype=np.int64)
    sums, hits = np.zeros(num_bins), np.zeros(num_bins)
    for rows in blocks_of_rows((len(confidence), 1)):
        exact = confidence[rows].astype(np.float64)
        bins = np.searchsorted(edges[1:-1], exact, side="left")
        counts += np.bincount(bins, minlength=num_bins)
        np.add.at(sums, bins, exact)  # one after the other, so that blocks change no bit
        np.add.at(hits, bins, right[rows])
    some = counts > 0
    mean = np.divide(sums, counts, out=np.full(num_bins, np.nan), where=some)
    accuracy = np.divide(hits, counts, out=np.full(num_bins, np.nan), where=some)
    ece = float(np.abs(sums - hits).sum() / counts.sum())
    return Reliability(edges=edges, counts=counts, confidence=mean, accuracy=accuracy, ece=ece)
