"""What makes a model's scores mean something: from logits to probabilities, to what it says of an
image, and to what it cannot exclude.

All of it is fitted on labelled images that the model was not trained on
(``evaluation/calibrating.py``) and kept in the model folder. Every path from logits to
probabilities goes through ``Calibration.probabilities``; one that says nothing changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rtl_dist.core.tasks import MULTI_LABEL, Task

THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a model's logits are read; by default as they are."""

    temperature: float = 1.0
    """Logits are divided by it (arXiv 1706.04599), which changes no top-1."""
    thresholds: tuple[float, ...] | None = None
    """Multi-label: a label is said from this probability on, one a label, in the order of the
    classes; None: from 0.5 on."""
    abstain_below: float | None = None
    """Single-label: with a top-1 probability below this the model abstains; None: it never does."""
    precision_target: float | None = None
    """The share of right ones among what is said, for which ``abstain_below`` or each of
    ``thresholds`` was chosen; None: these for the best F1."""
    set_quantile: float | None = None
    """A class is in an image's conformal set if 1 - probability is at most this; None: there are no
    sets."""
    coverage: float | None = None
    """The share of images whose set holds all that is true of them, as stated; what is reached is
    what ``evaluate`` measures."""
    num_samples: int = 0
    """Images that this was fitted on; 0: it was not fitted."""
    split: str = ""
    """Name of the split that they are of."""
    dataset_fingerprint: str = ""
    """Of the data set that they are of."""

    @property
    def was_fitted(self) -> bool:
        return self.num_samples > 0

    def probabilities(self, logits: torch.Tensor, task: Task) -> torch.Tensor:
        """Of logits (N, C), float32 (N, C): of a softmax over classes; multi-label: of a sigmoid
        each."""
        logits = logits.float()
        if task == MULTI_LABEL:
            return (logits / self.temperature).sigmoid()
        plain = logits.softmax(1)
        if self.temperature == 1.0:
            return plain
        return _with_first_of(plain, (logits / self.temperature).softmax(1))

    def said(self, probabilities: np.ndarray) -> np.ndarray:
        """Multi-label: which labels are said, bool of the shape of ``probabilities``, (N, C) or
        (C,)."""
        least = THRESHOLD if self.thresholds is None else np.array(self.thresholds)
        said: np.ndarray = probabilities >= least
        return said

    def sets_of(self, probabilities: np.ndarray) -> np.ndarray:
        """The conformal sets, bool of the shape of ``probabilities``, (N, C) or (C,). The most
        probable class is always there, or a model that is right more often than stated would have
        empty ones. Without a quantile it is alone."""
        first = np.expand_dims(probabilities.argmax(axis=-1), -1)
        members = np.zeros(probabilities.shape, dtype=bool)
        if self.set_quantile is not None:
            members = 1.0 - probabilities.astype(np.float64) <= self.set_quantile
        np.put_along_axis(members, first, True, axis=-1)
        return members

    def set_of(self, probabilities: np.ndarray) -> np.ndarray:
        """Of one image's probabilities (C,): the numbers of the classes in its conformal set,
        int64, the most probable first."""
        order = np.argsort(-probabilities, kind="stable")
        return order[self.sets_of(probabilities)[order]]

    def abstains(self, confidence: np.ndarray) -> np.ndarray:
        """Single-label: whether the model abstains, bool, by the top-1 probabilities."""
        if self.abstain_below is None:
            return np.zeros(np.shape(confidence), dtype=bool)
        abstains: np.ndarray = np.asarray(confidence) < self.abstain_below
        return abstains

    def told(self) -> str:
        """All of it in words, for a line or a page."""
        if not self.was_fitted:
            return "not calibrated"
        told = [f"temperature {self.temperature:.4g}"]
        if self.thresholds is not None:
            aim = "the best F1"
            if self.precision_target is not None:
                aim = f"a precision of {100 * self.precision_target:g} %"
            told.append(f"a threshold of each label for {aim}")
        if self.abstain_below is not None and self.precision_target is not None:
            aim = f"{100 * self.precision_target:g} % right"
            told.append(f"abstains below {self.abstain_below:.3f} to be {aim}")
        if self.coverage is not None:
            told.append(f"sets that hold the truth of {100 * self.coverage:g} % of images")
        return f"{', '.join(told)}; fitted on {self.num_samples:,} images of {self.split}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; what is as by default is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != getattr(UNCALIBRATED, name)
        }


UNCALIBRATED = Calibration()


def _with_first_of(plain: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """``scaled``, whose largest of a row is where that of ``plain`` is: rounding may have made
    equal what differed in the last bit, and then another class would come first."""
    first = plain.argmax(1, keepdim=True)
    largest = scaled.max(1, keepdim=True).values
    lifted = torch.nextafter(largest, torch.ones_like(largest))
    moved = scaled.argmax(1, keepdim=True) != first
    return scaled.scatter(1, first, torch.where(moved, lifted, scaled.gather(1, first)))
