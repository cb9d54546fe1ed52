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

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL, Task

TOP_K = 5
NUM_BINS = 15
THRESHOLD = 0.5

_Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
# A float32 probability that rounded to 0 was below the first, one that rounded to 1 was within the
# second of 1: the bounds that keep a loss finite without flattering it.
_TINY = float(np.finfo(np.float32).tiny)
_HALF_SPACING = 2.0**-25


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a model said of every sample of a split, row i being sample i.

    Raises:
        DataError: there are no samples.
        UserError: a score is not finite (the model diverged).
        ValueError: shapes, dtypes or ranges are not those above.
    """

    task: Task
    """Decides the shape of ``labels``, and which metrics there are."""
    classes: tuple[str, ...]
    """The C names, in the order of the columns of ``scores``."""
    labels: np.ndarray
    """The truth: int64 (N,), the class's number; multi-label: uint8 (N, C), 0 or 1."""
    scores: np.ndarray
    """float32 (N, C): probabilities, of a softmax; multi-label: of a sigmoid each."""

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape[1] != len(self.classes):
            raise ValueError(f"scores {self.scores.shape} do not fit {len(self.classes)} classes")
        if self.scores.dtype != np.float32:
            raise ValueError(f"scores are {self.scores.dtype}, expected float32")
        if not len(self.scores):
            raise DataError("there are no samples to score: choose a split that has some")
        finite = np.isfinite(self.scores).all(axis=1)
        if not finite.all():
            raise UserError(
                f"the model's scores are not finite (first at sample {int(np.argmin(finite))}):"
                " its weights diverged; evaluate an earlier checkpoint or train with a lower lr"
            )
        if self.scores.min() < 0 or self.scores.max() > 1 + 1e-3:
            raise ValueError("scores must be probabilities, but some lie outside [0, 1]")
        single = self.task == SINGLE_LABEL
        shape = self.scores.shape[:1] if single else self.scores.shape
        dtype, highest = (np.int64, len(self.classes) - 1) if single else (np.uint8, 1)
        if self.labels.shape != shape or self.labels.dtype != dtype:
            raise ValueError(
                f"labels are {self.labels.dtype} {self.labels.shape}, expected {dtype.__name__}"
                f" {shape}"
            )
        if self.labels.min() < 0 or self.labels.max() > highest:
            raise ValueError(f"labels must lie in 0 to {highest}")

    @property
    def num_samples(self) -> int:
        return len(self.scores)

    @property
    def predicted(self) -> np.ndarray:
        """The predicted class, int64 (N,); for multi-label data the decisions, bool (N, C)."""
        if self.task == MULTI_LABEL:
            return self.scores >= THRESHOLD
        return self.scores.argmax(axis=1)


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
    """Of the class against all others; None without samples of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
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


def compute_metrics(predictions: Predictions) -> dict[str, float]:
    """The figures that fit the task: ``single_label_metrics`` or ``multi_label_metrics``."""
    if predictions.task == MULTI_LABEL:
        return multi_label_metrics(predictions)
    return single_label_metrics(predictions)


def single_label_metrics(predictions: Predictions) -> dict[str, float]:
    """``loss`` (mean cross entropy, nats), ``top1``, ``top5`` (k = min(5, C)), ``macro_f1``,
    ``macro_precision``, ``macro_recall``, ``balanced_accuracy`` and ``ece`` (15 bins)."""
    labels, scores = predictions.labels, predictions.scores
    truth = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = (scores > truth).sum(axis=1) + ((scores == truth) & before).sum(axis=1)
    figures = metrics_from_confusion(confusion_matrix(predictions))
    del figures["per_class"]
    return figures | {
        "loss": float(-np.log(np.clip(truth.astype(np.float64), _TINY, 1.0)).mean()),
        "top5": float((rank < min(TOP_K, scores.shape[1])).mean()),
        "ece": calibration(predictions).ece,
    }


def multi_label_metrics(predictions: Predictions, threshold: float = THRESHOLD) -> dict[str, float]:
    """``loss`` (binary cross entropy, nats, mean over samples and classes), ``map`` (0 when no
    class has positives), and at score >= threshold ``micro_f1``, ``macro_f1``, ``exact_match``."""
    labels, scores = predictions.labels, predictions.scores.astype(np.float64)
    present = np.log(np.clip(scores, _TINY, 1.0))
    absent = np.log(np.clip(1.0 - scores, _HALF_SPACING, 1.0))
    counts = multi_label_confusion(predictions, threshold)
    precisions = [p for p in average_precisions(predictions) if p is not None]
    occurs = counts[:, 1, :].sum(axis=1) + counts[:, :, 1].sum(axis=1) > 0
    f1 = _precision_recall_f1(counts)[2]
    return {
        "loss": float(-np.where(labels == 1, present, absent).mean()),
        "map": float(np.mean(precisions)) if precisions else 0.0,
        "micro_f1": float(_precision_recall_f1(counts.sum(axis=0, keepdims=True))[2][0]),
        "macro_f1": float(f1[occurs].mean()) if occurs.any() else 0.0,
        "exact_match": float(((scores >= threshold) == labels).all(axis=1).mean()),
    }


def metrics_from_confusion(confusion: np.ndarray) -> dict[str, Any]:
    """Figures of a confusion matrix, int64 (C, C) with rows = truth.

    Returns:
        ``top1``, ``macro_f1``, ``macro_precision``, ``macro_recall``, ``balanced_accuracy``, and
        ``per_class``: ``num_samples`` and ``num_predicted`` int64 (C,), ``precision``, ``recall``
        and ``f1`` float64 (C,). Classes without samples: see the module's policy.

    Raises:
        DataError: the matrix counts no sample.
    """
    total = int(confusion.sum())
    if not total:
        raise DataError("the confusion matrix counts no sample: the split is empty")
    hits, true, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
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


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Single-label counts, int64 (C, C): row the truth, column the prediction."""
    size = len(predictions.classes)
    cells = predictions.labels * size + predictions.predicted
    return np.bincount(cells, minlength=size**2).reshape(size, size).astype(np.int64)


def multi_label_confusion(predictions: Predictions, threshold: float = THRESHOLD) -> np.ndarray:
    """Per-class counts, int64 (C, 2, 2): ``[c, truth, decision]``, laid out as scikit-learn's
    ``multilabel_confusion_matrix`` ([[tn, fp], [fn, tp]])."""
    truth, said = predictions.labels == 1, predictions.scores >= threshold
    hits, true, decided = (truth & said).sum(axis=0), truth.sum(axis=0), said.sum(axis=0)
    absent = predictions.num_samples - true - decided + hits
    counts = np.stack([absent, decided - hits, true - hits, hits], axis=1)
    return counts.reshape(-1, 2, 2).astype(np.int64)


def average_precisions(predictions: Predictions) -> list[float | None]:
    """Each class's average precision against all others (scikit-learn's
    ``average_precision_score``); None for a class without positives."""
    from sklearn.metrics import average_precision_score

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
        table = metrics_from_confusion(confusion_matrix(predictions))["per_class"]
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


def calibration(predictions: Predictions, num_bins: int = NUM_BINS) -> Calibration:
    """Confidence against accuracy in equal bins ``(low, high]`` (Guo et al. 2017).

    Single-label: the predicted class's probability against whether it is right, over samples.
    Multi-label: each class's probability against its presence, over samples and classes.
    """
    if predictions.task == MULTI_LABEL:
        confidence, right = predictions.scores.ravel(), predictions.labels.ravel()
    else:
        confidence = predictions.scores.max(axis=1)
        right = predictions.predicted == predictions.labels
    confidence = confidence.astype(np.float64)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.searchsorted(edges[1:-1], confidence, side="left")
    counts = np.bincount(bins, minlength=num_bins)
    sums = np.bincount(bins, weights=confidence, minlength=num_bins)
    hits = np.bincount(bins, weights=right.astype(np.float64), minlength=num_bins)
    some = counts > 0
    mean = np.divide(sums, counts, out=np.full(num_bins, np.nan), where=some)
    accuracy = np.divide(hits, counts, out=np.full(num_bins, np.nan), where=some)
    ece = float(np.abs(sums - hits).sum() / counts.sum())
    return Calibration(edges=edges, counts=counts, confidence=mean, accuracy=accuracy, ece=ece)


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
