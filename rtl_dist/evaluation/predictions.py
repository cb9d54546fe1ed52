"""What a model said of every sample of a split: the scores, or what single-label figures need of
them where there are too many to keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL, Task
from rtl_dist.model.calibration import UNCALIBRATED, Calibration

SCORES_AT_ONCE = 2**22  # that are looked at together


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """Of each of N samples, what single-label figures need of its scores."""

    predicted: np.ndarray
    """int64 (N,): the first of the classes with the largest score."""
    confidence: np.ndarray
    """float32 (N,): the largest score; not a number where one of the scores is none."""
    truth_score: np.ndarray
    """float32 (N,): that of the true class."""
    truth_rank: np.ndarray
    """int64 (N,): how many classes come before the true one."""
    set_size: np.ndarray
    """int64 (N,): how many classes are in the conformal set; 1 where there are no such sets."""


def outcomes_of(
    labels: np.ndarray, scores: np.ndarray, calibration: Calibration = UNCALIBRATED
) -> Outcomes:
    """The outcomes of labels int64 (N,) and scores float32 (N, C), by whose calibration there are
    conformal sets."""
    parts = [
        _outcomes(labels[rows], scores[rows], calibration) for rows in blocks_of_rows(scores.shape)
    ]
    return Outcomes(
        **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    )


def _outcomes(labels: np.ndarray, scores: np.ndarray, calibration: Calibration) -> Outcomes:
    truth = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return Outcomes(
        predicted=scores.argmax(axis=1),
        confidence=scores.max(axis=1),
        truth_score=truth[:, 0],
        truth_rank=(scores > truth).sum(axis=1) + ((scores == truth) & before).sum(axis=1),
        set_size=calibration.sets_of(scores).sum(axis=1),
    )


def blocks_of_rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the rows of a matrix, so that what is made of one is bounded; one at least."""
    num_rows = max(1, SCORES_AT_ONCE // max(1, shape[1]))
    for first in range(0, max(1, shape[0]), num_rows):
        yield slice(first, first + num_rows)


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
    scores: np.ndarray | None
    """float32 (N, C): probabilities, of a softmax; multi-label: of a sigmoid each. None: they were
    not kept, but their ``outcomes`` (single-label only)."""
    outcomes: Outcomes | None = None
    """Single-label: of the scores; made of them where they are given alone."""
    calibration: Calibration = UNCALIBRATED
    """By which the scores were made of logits, and by which it is decided what they say."""
    uncalibrated: Predictions | None = None
    """What the same logits say as they are; None where these are no others."""

    def __post_init__(self) -> None:
        self._check_labels()
        if self.scores is not None:
            self._check_scores(self.scores)
            if self.task == SINGLE_LABEL and self.outcomes is None:
                object.__setattr__(self, "outcomes", self._outcomes(self.scores))
        elif self.outcomes is None:
            raise ValueError("neither scores nor outcomes")
        if self.outcomes is not None:
            if len(self.outcomes.predicted) != self.num_samples:
                raise ValueError(f"{len(self.outcomes.predicted)} outcomes")
            _require_finite(np.isfinite(self.outcomes.confidence))

    def _outcomes(self, scores: np.ndarray) -> Outcomes:
        return outcomes_of(self.labels, scores, self.calibration)

    def _check_labels(self) -> None:
        if not len(self.labels):
            raise DataError("there are no samples to score: choose a split that has some")
        single = self.task == SINGLE_LABEL
        shape = (len(self.labels),) if single else (len(self.labels), len(self.classes))
        if self.scores is not None:
            shape = (len(self.scores), *shape[1:])
        dtype, highest = (np.int64, len(self.classes) - 1) if single else (np.uint8, 1)
        if self.labels.shape != shape or self.labels.dtype != dtype:
            raise ValueError(
                f"labels are {self.labels.dtype} {self.labels.shape}, expected {dtype.__name__}"
                f" {shape}"
            )
        if self.labels.min() < 0 or self.labels.max() > highest:
            raise ValueError(f"labels must lie in 0 to {highest}")

    def _check_scores(self, scores: np.ndarray) -> None:
        if scores.ndim != 2 or scores.shape[1] != len(self.classes):
            raise ValueError(f"scores {scores.shape} do not fit {len(self.classes)} classes")
        if scores.dtype != np.float32:
            raise ValueError(f"scores are {scores.dtype}, expected float32")
        blocks = blocks_of_rows(scores.shape)
        _require_finite(np.concatenate([np.isfinite(scores[b]).all(axis=1) for b in blocks]))
        if scores.min() < 0 or scores.max() > 1 + 1e-3:
            raise ValueError("scores must be probabilities, but some lie outside [0, 1]")

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def of_single_label(self) -> Outcomes:
        """``outcomes``, of single-label predictions."""
        assert self.outcomes is not None
        return self.outcomes

    @property
    def of_multi_label(self) -> np.ndarray:
        """``scores``, of multi-label predictions, which always have them."""
        assert self.scores is not None
        return self.scores

    @property
    def predicted(self) -> np.ndarray:
        """The predicted class, int64 (N,); for multi-label data the decisions, bool (N, C)."""
        if self.task == MULTI_LABEL:
            return self.calibration.said(self.of_multi_label)
        return self.of_single_label.predicted


def _require_finite(finite: np.ndarray) -> None:
    """Raises UserError: of some sample, bool (N,), the scores are not finite."""
    if not finite.all():
        raise UserError(
            f"the model's scores are not finite (first at sample {int(np.argmin(finite))}):"
            " its weights diverged; evaluate an earlier checkpoint or train with a lower lr"
        )
