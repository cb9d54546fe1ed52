"""What makes scores mean something, fitted on a split's logits; pure functions of arrays.

Three things guard against small splits. With fewer than 20 images nothing is fitted. Each share
that is promised is estimated as if one more image had been seen, and had gone wrong (the finite
sample correction of conformal prediction; Platt's, 1999, in the loss): so a split on which all is
right makes no model certain. And a label with fewer than ten images, or all but ten, keeps 0.5.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from rtl_dist.config import CalibrateConfig
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL, Task
from rtl_dist.evaluation.predictions import blocks_of_rows
from rtl_dist.model.calibration import THRESHOLD, Calibration

LEAST_SAMPLES = 20
LEAST_OF_LABEL = 10
PRECISION_TARGET = 0.95  # single-label, where none is asked for
_TEMPERATURES = (0.05, 20.0)
_NEVER = 1.0  # a threshold that is reached by rounding alone


def fit_calibration(
    logits: np.ndarray, labels: np.ndarray, task: Task, wanted: CalibrateConfig
) -> Calibration:
    """Args:
    logits: float32 (N, C), N at least ``LEAST_SAMPLES``.
    labels: the truth, as in ``Predictions``.
    """
    temperature = fit_temperature(logits, labels, task)
    scores = Calibration(temperature=temperature).probabilities(torch.from_numpy(logits), task)
    probabilities, target = scores.numpy(), wanted.precision_target
    abstain_below = thresholds = None
    if task == MULTI_LABEL:
        thresholds = tuple(
            _threshold_of_label(probabilities[:, number], labels[:, number] == 1, target)
            for number in range(labels.shape[1])
        )
    else:
        target = target or PRECISION_TARGET
        right = probabilities.argmax(axis=1) == labels
        abstain_below = lowest_threshold(probabilities.max(axis=1), right, target)
        if abstain_below is None:  # not with any: then it is no answer that can be believed so far
            target = None
    quantile = conformal_quantile(nonconformity(probabilities, labels, task), wanted.coverage)
    return Calibration(
        temperature=temperature,
        thresholds=thresholds,
        abstain_below=abstain_below,
        precision_target=target,
        set_quantile=quantile,
        coverage=None if quantile is None else wanted.coverage,
        num_samples=len(labels),
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray, task: Task) -> float:
    """The temperature of the least loss, 0.05 to 20, to four digits. Args: see
    ``fit_calibration``."""
    from scipy.optimize import minimize_scalar

    if logits.shape[1] == 1 and task == SINGLE_LABEL:
        return 1.0
    blocks, doubt = list(blocks_of_rows(logits.shape)), 1 / (len(labels) + 2)
    favoured = sum(_favoured(logits[rows], labels[rows], task, doubt) for rows in blocks)

    def mean_loss(log_temperature: float) -> float:
        """Cross-entropy with the truth and, with weight ``doubt``, with what else it may be."""
        sharpness = math.exp(-log_temperature)
        total = sum(_log_partition(logits[rows] * np.float32(sharpness), task) for rows in blocks)
        return (total - sharpness * favoured) / len(labels)

    bounds = tuple(map(math.log, _TEMPERATURES))
    found = minimize_scalar(mean_loss, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return float(f"{math.exp(found.x):.4g}")


def _favoured(logits: np.ndarray, labels: np.ndarray, task: Task, doubt: float) -> float:
    """The sum of the logits of the truth, and of what else it may be: of another answer to the same
    label, or of the strongest of the other classes."""
    if task == MULTI_LABEL:
        return float((np.where(labels == 1, 1 - doubt, doubt) * logits).sum())
    own, others = np.take_along_axis(logits, labels[:, None], axis=1), logits.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    return float(((1 - doubt) * own.astype(np.float64)[:, 0] + doubt * others.max(axis=1)).sum())


def _log_partition(logits: np.ndarray, task: Task) -> float:
    """The sum of the logarithms of what probabilities are divided by to add up to one."""
    if task == MULTI_LABEL:
        return float(np.logaddexp(0, logits).sum(dtype=np.float64))
    largest = logits.max(axis=1, keepdims=True)
    rest = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
    return float((np.log(rest) + largest[:, 0]).sum())


def nonconformity(probabilities: np.ndarray, labels: np.ndarray, task: Task) -> np.ndarray:
    """How unlikely the truth seemed, float64 (N,): what ``set_quantile`` must be at least for an
    image's set to hold it. 1 - probability, as in least ambiguous sets (Sadinle et al. 2019), but 0
    for the most probable class, which is in every set; multi-label: the most of all that are true.
    """
    unlikely = 1.0 - probabilities.astype(np.float64)
    np.put_along_axis(unlikely, probabilities.argmax(axis=1)[:, None], 0.0, axis=1)
    if task == SINGLE_LABEL:
        found: np.ndarray = np.take_along_axis(unlikely, labels[:, None], axis=1)[:, 0]
        return found
    most: np.ndarray = np.where(labels == 1, unlikely, 0.0).max(axis=1)
    return most


def conformal_quantile(scores: np.ndarray, coverage: float) -> float | None:
    """Below or at which the score of one more image lies with a chance of ``coverage`` or more;
    None: there are too few to say so."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else None


def lowest_threshold(scores: np.ndarray, right: np.ndarray, target: float) -> float | None:
    """The lowest of the scores such that of all at or above it, and one more that is wrong, at
    least ``target`` are right; None: there is none."""
    order = np.argsort(-scores, kind="stable")
    scores, wrong = scores[order], np.cumsum(~right[order])
    said = np.arange(1, len(scores) + 1)
    fits = (wrong + 1 <= (1 - target) * (said + 1) + 1e-9) & _ends_of_ties(scores)
    return float(scores[np.flatnonzero(fits)[-1]]) if fits.any() else None


def threshold_of_best_f1(scores: np.ndarray, present: np.ndarray) -> float:
    """Between two scores, so that F1 is best for those above."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order].astype(np.float64), np.cumsum(present[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + present.sum())
    best = int(np.where(_ends_of_ties(scores), f1, -1).argmax())
    below = scores[best + 1] if best + 1 < len(scores) else 0.0
    return float((scores[best] + below) / 2)


def _threshold_of_label(scores: np.ndarray, present: np.ndarray, target: float | None) -> float:
    is_rare = min(present.sum(), (~present).sum()) < LEAST_OF_LABEL
    if target is None:
        return THRESHOLD if is_rare else threshold_of_best_f1(scores, present)
    found = lowest_threshold(scores, present, target)
    return _NEVER if found is None else found


def _ends_of_ties(scores: np.ndarray) -> np.ndarray:
    """Where sorted scores change at the next one, bool (N,): equal ones are told apart by none."""
    return np.append(scores[1:] != scores[:-1], True)
