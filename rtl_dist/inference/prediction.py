"""What a model says of one image, or why it could not look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL, Task
from rtl_dist.inference.predictor import Predicting
from rtl_dist.model.calibration import Calibration

DIGITS = 6  # of a probability in text: what evaluate's tables have


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Of one image; the same values as ``rtl-dist evaluate`` has of it."""

    source: str
    """What the image was given as: a path, a URL, a member of a tar, a sample's key."""
    task: Task
    """Of the model."""
    classes: tuple[str, ...]
    """The K names, in the order of the probabilities."""
    calibration: Calibration
    """By which it abstains, makes sets and decides on labels."""
    probabilities: np.ndarray | None
    """float32 (K,); None: the image could not be read."""
    threshold: float | None = None
    """Multi-label: from which probability on a label is given; None: the calibration's."""
    error: str | None = None
    """Why there are no probabilities, to be put behind ``source``; None: there are."""

    @property
    def label(self) -> str | None:
        """The first of the most probable classes; None: the image could not be read."""
        return None if self.probabilities is None else self.classes[int(self._values.argmax())]

    @property
    def probability(self) -> float | None:
        """The largest; None: the image could not be read."""
        return None if self.probabilities is None else float(self._values.max())

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most probable classes, the most probable first; of equal ones the first of the
        model's order. Empty where the image could not be read."""
        if self.probabilities is None:
            return []
        return [
            (self.classes[i], float(self._values[i])) for i in self._order[: max(0, k)].tolist()
        ]

    @property
    def labels(self) -> tuple[str, ...]:
        """Multi-label: what the image has, in the model's order. Single-label: its label, or none
        where the model abstains."""
        if self.probabilities is None:
            return ()
        if self.task == SINGLE_LABEL:
            return () if self.abstained else (str(self.label),)
        if self.threshold is not None:
            said = self._values >= self.threshold
        else:
            said = self.calibration.said(self._values)
        return tuple(self.classes[i] for i in np.flatnonzero(said))

    @property
    def abstained(self) -> bool:
        """Whether the model is less sure than it must be to be believed (single-label)."""
        if self.task == MULTI_LABEL or self.probabilities is None:
            return False
        return bool(self.calibration.abstains(self._values.max()))

    @property
    def set(self) -> tuple[str, ...] | None:
        """The classes that the image may be, among which the true one is as often as the
        calibration states; None: it states nothing, or the image could not be read."""
        if self.probabilities is None or self.calibration.set_quantile is None:
            return None
        members = self.calibration.set_of(self._values)
        return tuple(self.classes[int(i)] for i in members)

    def to_dict(self, top: int = 1) -> dict[str, Any]:
        """As a line of JSON has it.

        Args:
            top: how many classes are told with their probabilities; multi-label, all labels are.
        """
        if self.probabilities is None:
            return {"input": self.source, "error": self.error}
        told: dict[str, Any] = {"input": self.source}
        if self.task == SINGLE_LABEL:
            told |= {"label": self.label, "probability": rounded(self.probability)}
        else:
            told["labels"] = [
                {"label": label, "probability": rounded(self.of(label))} for label in self.labels
            ]
        if top > 1:
            told["top"] = [
                {"label": label, "probability": rounded(value)} for label, value in self.top(top)
            ]
        if self.task == SINGLE_LABEL and self.calibration.abstain_below is not None:
            told["abstained"] = self.abstained
        if self.set is not None:
            told["set"] = list(self.set)
        return told

    def of(self, label: str) -> float | None:
        """The probability of a class. Raises ValueError: there is no such class."""
        place = self.classes.index(label)
        return None if self.probabilities is None else float(self._values[place])

    @cached_property
    def _order(self) -> np.ndarray:
        """The classes' numbers, the most probable first."""
        return np.argsort(-self._values, kind="stable")

    @property
    def _values(self) -> np.ndarray:
        assert self.probabilities is not None
        return self.probabilities


def predictions_of(
    predictor: Predicting,
    images: torch.Tensor,
    sources: Sequence[str],
    errors: Mapping[int, str],
    *,
    threshold: float | None,
) -> list[Prediction]:
    """What a model says of a block of images.

    Args:
        images: uint8 (N, C, S, S).
        sources: N, see ``Prediction.source``.
        errors: by place why some could not be read.
        threshold: see ``Prediction.threshold``.
    """
    values = predictor.probabilities(images)
    is_finite = np.isfinite(values).all(axis=1)
    predictions = []
    for place, source in enumerate(sources):
        error = errors.get(place)
        if error is None and not is_finite[place]:
            error = "has no finite probabilities: the model's weights diverged"
        predictions.append(
            Prediction(
                source=source,
                task=predictor.task,
                classes=predictor.classes,
                calibration=predictor.calibration,
                probabilities=None if error else values[place],
                threshold=threshold,
                error=error,
            )
        )
    return predictions


def rounded(probability: float | None) -> float | None:
    """As text has it."""
    return None if probability is None else round(probability, DIGITS)
