"""Exact figures of an evaluation, computed on the host from every sample's scores.

Everything here is a plain function of arrays, checked in the tests against scikit-learn's own.
Where conventions differ, these are followed throughout:

* *Ties.* The predicted class is the first of the largest scores (``argmax``), and top-k breaks ties
  in the same way, so that top-1 is top-k with k = 1.
* *Classes without samples.* Precision, recall and F1 are 0 where they would divide by zero
  (scikit-learn's ``zero_division=0``). Macro averages run over the classes that occur in the truth
  or in the predictions; balanced accuracy over the classes that occur in the truth; mean average
  precision over the classes that have positives.
* *Losses* are means in nats, of the probabilities as given: without label smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.evaluation.calibrated import calibrated_figures
from rtl_dist.evaluation.confusion import Confusion, confusion_of
from rtl_dist.evaluation.predictions import (
    SCORES_AT_ONCE,
    Predictions,
    blocks_of_rows,
)
from rtl_dist.evaluation.reliability import reliability

TOP_K = 5

_Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
# A float32 probability that rounded to 0 was below the first, one that rounded to 1 was within the
# second of 1: the bounds that keep a loss finite without flattering it.
_TINY = float(np.finfo(np.float32).tiny)
_HALF_SPACING = 2.0**-25


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One row of the per-class table."""

    name: str
    """Of the class."""
    num_samples: int
    """That are of the class."""
    precision: float
    """Share of right ones among the samples said to be of the class; 0 to 1, as all that follow."""
    recall: float
    """Share of those found among the samples of the class."""
    f1: float
    """Harmonic mean of the two."""
    average_precision: float | None
    """Of the class against all others; None without samples of it, or where the scores were not
    kept."""


def compute_metrics(predictions: Predictions) -> dict[str, float]:
    """The figures that fit the task, ``single_label_metrics`` or ``multi_label_metrics``, and what
    there is to say of a calibration, ``calibrated_figures``."""
    figures = _of_task(predictions)
    if predictions.uncalibrated is None:
        return figures
    return figures | calibrated_figures(predictions, raw=_of_task(predictions.uncalibrated))


def _of_task(predictions: Predictions) -> dict[str, float]:
    if predictions.task == MULTI_LABEL:
        return multi_label_metrics(predictions)
    return single_label_metrics(predictions)


def single_label_metrics(predictions: Predictions) -> dict[str, float]:
    """``loss`` (mean cross entropy, nats), ``top1``, ``top5`` (k = min(5, C)), ``macro_f1``,
    ``macro_precision``, ``macro_recall``, ``balanced_accuracy`` and ``ece`` (15 bins)."""
    outcomes = predictions.of_single_label
    figures = metrics_from_confusion(confusion_of(predictions))
    del figures["per_class"]
    truth = outcomes.truth_score.astype(np.float64)
    return figures | {
        "loss": float(-np.log(np.clip(truth, _TINY, 1.0)).mean()),
        "top5": float((outcomes.truth_rank < min(TOP_K, len(predictions.classes))).mean()),
        "ece": reliability(predictions).ece,
    }


def multi_label_metrics(predictions: Predictions) -> dict[str, float]:
    """``loss`` (binary cross entropy, nats, mean over samples and classes), ``map`` (0 when no
    class has positives), ``micro_f1``, ``macro_f1`` and ``exact_match`` of the labels that are
    said, and ``ece`` (15 bins, over samples and classes)."""
    labels, scores = predictions.labels, predictions.of_multi_label
    counts = multi_label_confusion(predictions)
    precisions = [p for p in average_precisions(predictions) if p is not None]
    occurs = counts[:, 1, :].sum(axis=1) + counts[:, :, 1].sum(axis=1) > 0
    f1 = _precision_recall_f1(counts)[2]
    return {
        "loss": float(-_log_likelihood(labels.ravel(), scores.ravel()) / scores.size),
        "map": float(np.mean(precisions)) if precisions else 0.0,
        "micro_f1": float(_precision_recall_f1(counts.sum(axis=0, keepdims=True))[2][0]),
        "macro_f1": float(f1[occurs].mean()) if occurs.any() else 0.0,
        "exact_match": float(
            np.concatenate(
                [
                    (predictions.calibration.said(scores[rows]) == labels[rows]).all(axis=1)
                    for rows in blocks_of_rows(scores.shape)
                ]
            ).mean()
        ),
        "ece": reliability(predictions).ece,
    }


def _log_likelihood(labels: np.ndarray, scores: np.ndarray) -> float:
    """The sum of the logarithms of the probabilities of what is true, of flat arrays. Numpy's own
    sum would halve the whole in the same way, so that it is the same to the last bit."""
    if len(scores) > SCORES_AT_ONCE:
        half = len(scores) // 2
        half -= half % 8
        return _log_likelihood(labels[:half], scores[:half]) + _log_likelihood(
            labels[half:], scores[half:]
        )
    exact = scores.astype(np.float64)
    present = np.log(np.clip(exact, _TINY, 1.0))
    absent = np.log(np.clip(1.0 - exact, _HALF_SPACING, 1.0))
    return float(np.where(labels == 1, present, absent).sum())


def metrics_from_confusion(confusion: Confusion) -> dict[str, Any]:
    """Figures of a confusion matrix.

    Returns:
        ``top1``, ``macro_f1``, ``macro_precision``, ``macro_recall``, ``balanced_accuracy``, and
        ``per_class``: ``num_samples`` and ``num_predicted`` int64 (C,), ``precision``, ``recall``
        and ``f1`` float64 (C,). Classes without samples: see the module's policy.

    Raises:
        DataError: the matrix counts no sample.
    """
    total = int(confusion.counts.sum())
    if not total:
        raise DataError("the confusion matrix counts no sample: the split is empty")
    hits, true, said = confusion.hits, confusion.num_samples, confusion.num_predicted
    counts = np.stack([total - true - said + hits, said - hits, true - hits, hits], axis=1)
    precision, recall, f1 = _precision_recall_f1(counts.reshape(-1, 2, 2))
    occurs = (true > 0) | (said > 0)
    return {
        "top1": float(hits.sum() / total),
        "macro_f1": float(f1[occurs].mean()),
        "macro_precision": float(precision[occurs].mean()),
        "macro_recall": float(recall[occurs].mean()),
        "balanced_accuracy": float(recall[true > 0].mean()),
        "per_class": {
            "num_samples": true,
            "num_predicted": said,
            "precision": precision,
            "recall": recall,
            "f1": f1,
        },
    }


def multi_label_confusion(predictions: Predictions) -> np.ndarray:
    """Per-class counts, int64 (C, 2, 2): ``[c, truth, decision]``, laid out as scikit-learn's
    ``multilabel_confusion_matrix`` ([[tn, fp], [fn, tp]])."""
    labels, scores = predictions.labels, predictions.of_multi_label
    hits = true = decided = np.zeros(len(predictions.classes), dtype=np.int64)
    for rows in blocks_of_rows(scores.shape):
        truth, said = labels[rows] == 1, predictions.calibration.said(scores[rows])
        hits = hits + (truth & said).sum(axis=0)
        true, decided = true + truth.sum(axis=0), decided + said.sum(axis=0)
    absent = predictions.num_samples - true - decided + hits
    counts = np.stack([absent, decided - hits, true - hits, hits], axis=1)
    return counts.reshape(-1, 2, 2).astype(np.int64)


def average_precisions(predictions: Predictions) -> list[float | None]:
    """Each class's average precision against all others (scikit-learn's
    ``average_precision_score``); None for a class without positives, and for all where the scores
    were not kept."""
    from sklearn.metrics import average_precision_score

    if predictions.scores is None:
        return [None] * len(predictions.classes)
    result: list[float | None] = []
    for number in range(len(predictions.classes)):
        truth = positives(predictions, number)
        score = predictions.scores[:, number]
        result.append(float(average_precision_score(truth, score)) if truth.any() else None)
    return result


def positives(predictions: Predictions, class_number: int) -> np.ndarray:
    """Which samples are of a class, bool (N,)."""
    if predictions.task == MULTI_LABEL:
        return predictions.labels[:, class_number] == 1
    return predictions.labels == class_number


def per_class_table(predictions: Predictions) -> list[ClassScores]:
    """One row a class, in the classes' order."""
    if predictions.task == MULTI_LABEL:
        counts = multi_label_confusion(predictions)
        num_samples = counts[:, 1, :].sum(axis=1)
        precision, recall, f1 = _precision_recall_f1(counts)
    else:
        table = metrics_from_confusion(confusion_of(predictions))["per_class"]
        num_samples, f1 = table["num_samples"], table["f1"]
        precision, recall = table["precision"], table["recall"]
    areas = average_precisions(predictions)
    return [
        ClassScores(
            name=name,
            num_samples=int(num_samples[i]),
            precision=float(precision[i]),
            recall=float(recall[i]),
            f1=float(f1[i]),
            average_precision=areas[i],
        )
        for i, name in enumerate(predictions.classes)
    ]


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which stays in [0, 1] for few samples."""
    share, z2 = hits / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = share * (1 - share) / total + z2 / (4 * total**2)
    half = _Z95 * float(np.sqrt(spread)) / (1 + z2 / total)
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    return low, 1.0 if hits == total else min(1.0, centre + half)


def _precision_recall_f1(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of per-class counts (C, 2, 2); float64 (C,) each, 0 where undefined."""
    hits, false, missed = counts[:, 1, 1], counts[:, 0, 1], counts[:, 1, 0]
    return (
        _ratio(hits, hits + false),
        _ratio(hits, hits + missed),
        _ratio(2 * hits, 2 * hits + false + missed),
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
