"""The loss of a linear head on features that do not change, as a function to be minimised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from rtl_dist.config import OptimConfig

CHUNK = 8192  # rows that are computed at a time


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """The mean weighted loss of ``features @ weight.T + bias``, plus ``penalty / 2 * |weight|^2``.

    The loss is cross-entropy where each sample has one label; where classes are judged one by one,
    binary cross-entropy, summed over them. A solution is a tensor (C, F + 1): weights, and biases
    in the last column.
    """

    features: torch.Tensor
    """float (n, F), centred and of a common scale, so that a penalty means the same everywhere."""
    targets: torch.Tensor
    """float (n, C): what is to be learned, smoothed."""
    true: torch.Tensor
    """float (n, C): the same without smoothing."""
    weights: torch.Tensor
    """float (n, 1) of each sample's loss, or (n, C) of each class's."""
    shift: torch.Tensor
    """float (C,): added to the scores in training (logit adjustment); zeros for none."""
    one_label: bool
    """Cross-entropy; else binary cross-entropy of each class."""

    @property
    def num_samples(self) -> int:
        return len(self.features)

    def to(self, dtype: torch.dtype) -> HeadProblem:
        """In another precision."""
        names = ("features", "targets", "true", "weights", "shift")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def rows(self, chosen: torch.Tensor | slice) -> HeadProblem:
        """The problem of some samples: a bool tensor (n,), or a slice."""
        return replace(
            self,
            features=self.features[chosen],
            targets=self.targets[chosen],
            true=self.true[chosen],
            weights=self.weights[chosen],
        )

    def true_loss(self, solution: torch.Tensor) -> float:
        """What a solution is judged by on samples that it does not know: the mean weighted loss
        against their true labels."""
        total = sum(
            float(part._losses(part._scores(solution) + part.shift, part.true).sum())
            for part in self._chunks()
        )
        return total / self.num_samples

    def value_and_gradient(
        self, solution: torch.Tensor, penalty: float
    ) -> tuple[float, torch.Tensor]:
        """What is minimised, and its derivative (C, F + 1)."""
        weight = solution[:, :-1]
        value = 0.5 * penalty * float(weight.square().sum())
        gradient = F.pad(penalty * weight, (0, 1))
        for part in self._chunks():
            scores = part._scores(solution) + part.shift
            value += float(part._losses(scores, part.targets).sum()) / self.num_samples
            found = scores.softmax(1) if self.one_label else scores.sigmoid()
            slope = (found - part.targets) * part.weights / self.num_samples
            gradient[:, :-1].addmm_(slope.T, part.features)
            gradient[:, -1] += slope.sum(0)
        return value, gradient

    def _scores(self, solution: torch.Tensor) -> torch.Tensor:
        return torch.addmm(solution[:, -1], self.features, solution[:, :-1].T)

    def _losses(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.one_label:
            return -(targets * scores.log_softmax(1)) * self.weights
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="none") * self.weights

    def _chunks(self) -> Iterator[HeadProblem]:
        for first in range(0, self.num_samples, CHUNK):
            yield self.rows(slice(first, first + CHUNK))


def head_problem(
    features: torch.Tensor,
    labels: torch.Tensor,
    config: OptimConfig,
    *,
    multi_label: bool,
    class_counts: tuple[int, ...],
    is_balanced: bool,
) -> HeadProblem:
    """The problem that ``make_loss`` of the same config poses, for all samples at once.

    Args:
        features: see ``HeadProblem``.
        labels: int64 (n,), or 0/1 (n, C) for multi-label data.
        is_balanced: each class counts as often as any other, as a balanced sampling has it.
    """
    dtype, device = features.dtype, features.device
    smoothing, num_classes = config.label_smoothing, len(class_counts)
    counts = torch.tensor(class_counts, dtype=torch.float64, device=device).clamp(min=1)
    balanced = counts.sum() / (num_classes * counts)
    is_weighted = is_balanced or config.class_weights == "balanced"
    one_label = not multi_label and config.loss != "bce"
    true = torch.zeros(len(features), num_classes, dtype=dtype, device=device)
    true = labels.to(dtype) if multi_label else true.scatter_(1, labels[:, None], 1)
    evenly = 0.5 if multi_label else 1 / num_classes
    weights = torch.ones(len(features), 1, dtype=dtype, device=device)
    if is_weighted and (one_label or is_balanced):
        weights = balanced[labels][:, None].to(dtype)
    elif is_weighted:
        weights = torch.where(true > 0.5, balanced.to(dtype), 1.0)
    return HeadProblem(
        features=features,
        targets=true * (1 - smoothing) + evenly * smoothing,
        true=true,
        weights=weights,
        shift=(config.logit_adjustment * (counts / counts.sum()).log()).to(dtype),
        one_label=one_label,
    )
