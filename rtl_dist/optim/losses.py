"""The training loss of each sample, so that a mean over any split of a batch is the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from rtl_dist.config import OptimConfig
from rtl_dist.core.tasks import MULTI_LABEL, Task

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(
    config: OptimConfig, *, task: Task, class_counts: tuple[int, ...], device: torch.device
) -> Loss:
    """The loss a sample: (scores (n, C), labels) to (n,).

    labels: int64 (n,), float (n, C) of class probabilities (mixup), or 0/1 for multi-label data.
    Where classes are judged one by one (bce, and focal on multi-label data) their losses are
    averaged. Class weights scale each sample's own loss and are not normalised within a batch;
    "balanced" weights average 1 over the training set.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64).clamp(min=1)
    weight = None
    if config.class_weights == "balanced":
        weight = (counts.sum() / (len(counts) * counts)).to(device)
    gamma = config.focal_gamma if config.loss == "focal" else 0.0
    if task == MULTI_LABEL or config.loss == "bce":
        return _BinaryLoss(config.label_smoothing, gamma, weight, one_label=task != MULTI_LABEL)
    shift = None
    if config.logit_adjustment:
        shift = (config.logit_adjustment * (counts / counts.sum()).log()).to(device)
    return _ClassLoss(config.label_smoothing, gamma, weight, shift)


class _ClassLoss:
    """Cross-entropy; with ``gamma`` the focal loss (Lin et al., arXiv 1708.02002), for labels that
    are probabilities sum_c q_c (1 - p_c)^gamma (-log p_c); with ``shift`` (C,) the logit-adjusted
    loss (Menon et al., arXiv 2007.07314)."""

    def __init__(
        self,
        smoothing: float,
        gamma: float,
        weight: torch.Tensor | None,
        shift: torch.Tensor | None,
    ) -> None:
        self._smoothing, self._gamma, self._weight, self._shift = smoothing, gamma, weight, shift

    def __call__(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._shift is not None:
            scores = scores + self._shift.to(scores.dtype)
        if self._gamma:
            logs = scores.log_softmax(1)
            wanted = _probabilities(labels, scores, self._smoothing)
            losses = -(wanted * _power(1 - logs.exp(), self._gamma) * logs).sum(1)
        else:
            losses = F.cross_entropy(
                scores, labels, reduction="none", label_smoothing=self._smoothing
            )
        if self._weight is None:
            return losses
        one_label = labels.ndim == 1
        of_sample = (
            self._weight[labels] if one_label else labels.to(self._weight.dtype) @ self._weight
        )
        return losses * of_sample.to(losses.dtype)


class _BinaryLoss:
    """Binary cross-entropy of each class, averaged over the classes; with ``gamma`` focal."""

    def __init__(
        self, smoothing: float, gamma: float, weight: torch.Tensor | None, *, one_label: bool
    ) -> None:
        self._smoothing, self._gamma, self._weight = smoothing, gamma, weight
        self._one_label = one_label

    def __call__(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._one_label:
            wanted = smooth = _probabilities(labels, scores, self._smoothing)
        else:
            wanted = labels.to(scores.dtype)
            smooth = wanted * (1 - self._smoothing) + 0.5 * self._smoothing
        losses = F.binary_cross_entropy_with_logits(scores, smooth, reduction="none")
        if self._gamma:
            right = scores.sigmoid()
            right = smooth * right + (1 - smooth) * (1 - right)
            losses = losses * _power(1 - right, self._gamma)
        if self._weight is not None:
            positive = labels > 0.5 if not self._one_label else wanted > 0.5
            losses = losses * torch.where(positive, self._weight.to(losses.dtype), 1.0)
        return losses.mean(1)


def _power(doubt: torch.Tensor, gamma: float) -> torch.Tensor:
    """Its gradient is finite at 0 too, also for gamma below 1."""
    return doubt.clamp(min=torch.finfo(doubt.dtype).tiny).pow(gamma)


def _probabilities(labels: torch.Tensor, scores: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Smoothed class probabilities (n, C) of labels that are numbers or probabilities."""
    num_classes = scores.shape[1]
    wanted = F.one_hot(labels, num_classes) if labels.ndim == 1 else labels
    return wanted.to(scores.dtype) * (1 - smoothing) + smoothing / num_classes
