"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rtl_dist.config import OptimConfig, StageConfig
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.parts import NORMS, parts_of


def build_optimizer(
    model: Classifier, stage: StageConfig, config: OptimConfig, *, lr: float
) -> torch.optim.Optimizer:
    """A fresh optimizer over the stage's trainable parameters, each in one group.

    Groups carry ``parts``, ``base_lr`` (the head's ``lr``, times ``layer_decay`` for each part
    further down) and ``weight_decay``, which is 0 for biases and norms, told by module type. Parts
    with equal ones share a group: a GPU is asked for each group's step by itself.

    It is a fused one, which can be told by a tensor, ``found_inf``, not to take a step: nobody has
    to wait for the device to know whether the gradient was finite.
    """
    by_rule: dict[tuple[float, float], dict[str, Any]] = {}
    parts = parts_of(model)
    for depth, (part, modules) in enumerate(reversed(list(parts.items()))):
        base_lr = lr * stage.layer_decay**depth
        decayed, plain = _split_by_decay(modules)
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                rule = {"weight_decay": decay, "lr": base_lr, "base_lr": base_lr}
                group = by_rule.setdefault((base_lr, decay), {"params": [], "parts": [], **rule})
                group["params"] += parameters
                group["parts"] += [part] if part not in group["parts"] else []
    groups = list(by_rule.values())
    covered = [p for group in groups for p in group["params"]]
    wanted = [p for p in model.parameters() if p.requires_grad]
    if {id(p) for p in covered} != {id(p) for p in wanted} or len(covered) != len(wanted):
        raise RuntimeError("the optimizer does not cover every trainable parameter exactly once")
    if config.name == "sgd":
        momentum = config.momentum
        sgd = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum:
            # left to itself, a first step that is not taken leaves memory as it was found (2.15)
            for parameter in wanted:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, betas=config.betas, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets every group's rate to ``base_lr * factor``; returns ``lr/<part>`` of each part."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        rates |= {f"lr/{part}": group["lr"] for part in group["parts"]}
    return rates


def require_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Proves that every group has the rate that ``set_learning_rates`` gave it.

    Raises:
        RuntimeError: something else has set it.
    """
    for group in optimizer.param_groups:
        if group["lr"] != group["base_lr"] * factor:
            raise RuntimeError(
                f"the learning rate of {', '.join(group['parts'])} is {group['lr']} and was to be"
                f" {group['base_lr'] * factor}"
            )


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
