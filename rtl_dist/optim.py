"""Optimizer, parameter groups and loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from rtl_dist.config import Optim, Stage
from rtl_dist.data.dataset import MULTI_LABEL
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.parts import NORMS, parts_of


def build_optimizer(model: Classifier, stage: Stage, config: Optim) -> torch.optim.Optimizer:
    """A fresh optimizer over the stage's trainable parameters, each in one group.

    Groups carry ``part``, ``base_lr`` (the head's ``stage.lr``, times ``layer_decay`` for each part
    further down) and ``weight_decay``, which is 0 for biases and norms, told by module type.
    """
    groups = []
    parts = parts_of(model)
    for depth, (part, modules) in enumerate(reversed(list(parts.items()))):
        base_lr = stage.lr * stage.layer_decay**depth
        decayed, plain = _split_by_decay(modules)
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "weight_decay": decay,
                        "lr": base_lr,
                        "base_lr": base_lr,
                        "part": part,
                    }
                )
    covered = [p for group in groups for p in group["params"]]
    wanted = [p for p in model.parameters() if p.requires_grad]
    if {id(p) for p in covered} != {id(p) for p in wanted} or len(covered) != len(wanted):
        raise RuntimeError("the optimizer does not cover every trainable parameter exactly once")
    fused = covered[0].is_cuda
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused or None
        )
    return torch.optim.AdamW(groups, betas=config.betas, fused=fused or None)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets every group's rate to ``base_lr * factor``; returns ``lr/<part>`` of each part."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        rates[f"lr/{group['part']}"] = group["lr"]
    return rates


def make_loss(
    config: Optim, *, task: str, class_counts: tuple[int, ...], device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The training loss a sample: (scores (n, C), labels) to (n,).

    labels: int64 (n,), float (n, C) of class probabilities (mixup), or 0/1 for multi-label data,
    whose loss is binary cross-entropy averaged over the classes. Class weights scale each sample's
    own loss and are not normalised within a batch, so the loss does not depend on how a batch is
    split; "balanced" weights average 1 over the training set.
    """
    smoothing = config.label_smoothing
    counts = torch.tensor(class_counts, dtype=torch.float64).clamp(min=1)
    weight = None
    if config.class_weights == "balanced":
        weight = (counts.sum() / (len(counts) * counts)).to(device)

    def cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
        if weight is None:
            return losses
        of_sample = weight[labels] if labels.ndim == 1 else labels.to(weight.dtype) @ weight
        return losses * of_sample.to(losses.dtype)

    def binary_cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smooth = labels.to(scores.dtype) * (1 - smoothing) + 0.5 * smoothing
        losses = F.binary_cross_entropy_with_logits(scores, smooth, reduction="none")
        if weight is not None:
            losses = losses * torch.where(labels > 0.5, weight.to(losses.dtype), 1.0)
        return losses.mean(1)

    return binary_cross_entropy if task == MULTI_LABEL else cross_entropy


def _split_by_decay(modules: list[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    exempt = isinstance(module, NORMS) or name == "bias"
                    (plain if exempt else decayed).append(parameter)
    return decayed, plain
