"""A linear head solved to its optimum on features that do not change, its penalty chosen by
cross-validation.

With the trunk frozen, the loss of a linear head is a convex function of a few thousand numbers, of
which a second-order method finds the minimum in a fraction of what the features cost; an optimizer
that steps through batches stops somewhere near it, and where depends on its rate and length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

LOG = logging.getLogger("rtl_dist")

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)
"""Tried in this order: strongest first, each from the solution of the one before."""
WITHOUT_CHOICE = 0.01
"""Where too few images allow no cross-validation."""
_FOLDS = 5
_WORSE_IN_A_ROW = 2  # the search ends: the held-out loss is convex enough in the penalty
_LARGE = 2**31  # numbers multiplied in one pass: from here on one fold is held out, not five
_CHUNK = 8192  # rows that are computed at a time
_LOOSE, _TIGHT = 1e-4, 1e-6  # largest derivative at the end: to compare penalties; to keep


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """The mean weighted loss of ``features @ weight.T + bias`` plus ``penalty / 2 * |weight|^2``.

    The loss is cross-entropy where each sample has one label; where classes are judged one by one,
    binary cross-entropy summed over them.
    """

    features: torch.Tensor
    """float (N, F), centred, of a common scale; views of a sample follow each other by N / views
    rows."""
    targets: torch.Tensor
    """float (N, C): probabilities of the classes, smoothed as they are to be trained."""
    true: torch.Tensor
    """float (N, C): the same without smoothing, for judging."""
    sample_weights: torch.Tensor
    """float (N,), of mean 1."""
    shift: torch.Tensor
    """float (C,): added to the scores in training (logit adjustment), zeros for none."""
    one_label: bool
    """Cross-entropy; else binary cross-entropy of each class."""

    @property
    def num_samples(self) -> int:
        return len(self.features)

    def rows(self, chosen: torch.Tensor) -> HeadProblem:
        """The problem of some samples: int64 or bool (N,)."""
        return replace(
            self,
            features=self.features[chosen],
            targets=self.targets[chosen],
            true=self.true[chosen],
            sample_weights=self.sample_weights[chosen],
        )

    def loss(self, solution: torch.Tensor) -> float:
        """Mean weighted loss against the true labels, without penalty: what a held-out part is
        judged by."""
        total = 0.0
        for part in self._chunks():
            scores = part.scores(solution)
            losses = part._losses(scores, part.true)
            total += float((losses * part.sample_weights).sum())
        return total / max(1.0, float(self.sample_weights.sum()))

    def scores(self, solution: torch.Tensor) -> torch.Tensor:
        """(N, C), of a solution (C, F + 1)."""
        return torch.addmm(solution[:, -1], self.features, solution[:, :-1].T)

    def value_and_gradient(
        self, solution: torch.Tensor, penalty: float
    ) -> tuple[float, torch.Tensor]:
        """What is minimised, and its derivative (C, F + 1), at a solution (C, F + 1)."""
        weight = solution[:, :-1]
        value = 0.5 * penalty * float(weight.square().sum())
        gradient = F.pad(penalty * weight, (0, 1))
        share = 1 / float(self.sample_weights.sum())
        for part in self._chunks():
            scores = part.scores(solution) + part.shift
            losses = part._losses(scores, part.targets)
            value += share * float((losses * part.sample_weights).sum())
            found = scores.softmax(1) if self.one_label else scores.sigmoid()
            slope = (found - part.targets) * (part.sample_weights * share)[:, None]
            gradient[:, :-1].addmm_(slope.T, part.features)
            gradient[:, -1] += slope.sum(0)
        return value, gradient

    def _losses(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.one_label:
            return -(targets * scores.log_softmax(1)).sum(1)
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").sum(1)

    def _chunks(self) -> Iterator[HeadProblem]:
        for first in range(0, self.num_samples, _CHUNK):
            yield self.rows(slice(first, first + _CHUNK))  # type: ignore[arg-type]


def solve(
    problem: HeadProblem,
    penalty: float,
    *,
    start: torch.Tensor | None = None,
    precision: float = _TIGHT,
) -> torch.Tensor:
    """The solution (C, F + 1), weights and biases, by L-BFGS (Liu & Nocedal 1989).

    Args:
        start: to begin with; None: zeros.
        precision: the largest derivative that is left, at most.
    """
    from scipy.optimize import minimize

    features = problem.features
    shape = problem.targets.shape[1], features.shape[1] + 1
    first = torch.zeros(shape, dtype=torch.float64) if start is None else start

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        solution = torch.from_numpy(flat).view(shape).to(features)
        value, gradient = problem.value_and_gradient(solution, penalty)
        return value, gradient.double().cpu().numpy().ravel()

    found = minimize(
        value_and_gradient,
        first.double().cpu().numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 4000, "gtol": precision, "ftol": 1e-14, "maxcor": 20},
    )
    return torch.from_numpy(found.x).view(shape)


def choose_penalty(problem: HeadProblem, folds: torch.Tensor) -> tuple[float, list[float]]:
    """The penalty with the lowest held-out loss, and the loss of each that was tried, in order.

    Args:
        folds: int64 (N,), in which part a sample is held out; -1: it never is.
    """
    held_out = [int(fold) for fold in folds.unique() if fold >= 0]
    if problem.features.numel() * problem.targets.shape[1] > _LARGE:
        held_out = held_out[:1]
    if not held_out:
        return WITHOUT_CHOICE, []
    parts = [(problem.rows(folds != fold), problem.rows(folds == fold)) for fold in held_out]
    starts: list[torch.Tensor | None] = [None] * len(parts)
    losses: list[float] = []
    for penalty in PENALTIES:
        total = 0.0
        for i, (kept, judged) in enumerate(parts):
            found = starts[i] = solve(kept, penalty, start=starts[i], precision=_LOOSE)
            total += judged.loss(found.to(problem.features)) * judged.num_samples
        losses.append(total / sum(judged.num_samples for _, judged in parts))
        best = int(np.argmin(losses))
        if len(losses) - 1 - best >= _WORSE_IN_A_ROW:
            break
    return PENALTIES[int(np.argmin(losses))], losses


def assign_folds(labels: torch.Tensor, *, seed: int) -> torch.Tensor:
    """In which of five parts each image is held out, int64 (n,): -1 for the only image of a class,
    which must not be missed in training.

    Args:
        labels: int64 (n,), shared out class by class; or 0/1 (n, C), shared out as they come.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    if labels.ndim == 2:
        folds = torch.empty(len(labels), dtype=torch.int64)
        folds[order] = torch.arange(len(labels)) % _FOLDS
        return folds if len(labels) >= 2 else torch.full_like(folds, -1)
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % _FOLDS
    counts = labels.bincount()
    return torch.where(counts[labels] < 2, -1, folds)
