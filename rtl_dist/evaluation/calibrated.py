"""What an evaluation says of a calibration: what was before it, and whether it keeps its word."""

from __future__ import annotations

import numpy as np

from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.evaluation.predictions import Predictions, blocks_of_rows

RAW = "_raw"
_CHANGED = ("loss", "ece", "micro_f1", "macro_f1", "exact_match")


def calibrated_figures(predictions: Predictions, *, raw: dict[str, float]) -> dict[str, float]:
    """Of calibrated predictions: what calibration changes as it was before (``ece_raw`` and
    others); ``set_coverage``, the share of samples whose conformal set holds all that is true, and
    ``set_size``, its mean; ``answered``, the share on which the model does not abstain, and
    ``answered_top1``, the share of right ones among these. Left out: of what there is none.

    Args:
        raw: the metrics of the same logits, not calibrated.
    """
    is_multi = predictions.task == MULTI_LABEL
    figures = {
        f"{name}{RAW}": raw[name]
        for name in _CHANGED
        if name in raw and (is_multi or name in ("loss", "ece"))
    }
    if predictions.calibration.set_quantile is not None:
        covered, size = _sets_of_labels(predictions) if is_multi else _sets(predictions)
        figures |= {"set_coverage": float(covered.mean()), "set_size": float(size.mean())}
    if predictions.calibration.abstain_below is not None:
        outcomes = predictions.of_single_label
        answered = ~predictions.calibration.abstains(outcomes.confidence)
        figures["answered"] = float(answered.mean())
        if answered.any():
            right = outcomes.predicted[answered] == predictions.labels[answered]
            figures["answered_top1"] = float(right.mean())
    return figures


def _sets(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Whether each set holds the truth, bool (N,), and its size, int64 (N,)."""
    outcomes, quantile = predictions.of_single_label, predictions.calibration.set_quantile
    assert quantile is not None
    near = 1.0 - outcomes.truth_score.astype(np.float64) <= quantile
    return near | (outcomes.truth_rank == 0), outcomes.set_size


def _sets_of_labels(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    scores, covered, size = predictions.of_multi_label, [], []
    for rows in blocks_of_rows(scores.shape):
        members = predictions.calibration.sets_of(scores[rows])
        covered.append((members | (predictions.labels[rows] == 0)).all(axis=1))
        size.append(members.sum(axis=1))
    return np.concatenate(covered), np.concatenate(size)
