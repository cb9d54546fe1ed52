"""What is trained and what is held, and hashes that prove it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.config import StageConfig
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.parts import parts_of, trainable_parts


def freeze_for(model: Classifier, stage: StageConfig) -> None:
    """Sets ``requires_grad`` for a stage, and, by ``set_modes``, the layers' modes."""
    chosen = trainable_parts(model, stage)
    for name, modules in parts_of(model).items():
        for module in modules:
            for parameter in module.parameters():
                parameter.requires_grad_(name in chosen)
            if name in chosen and stage.batchnorm != "train":
                for layer in module.modules():
                    if isinstance(layer, _BatchNorm):
                        for parameter in layer.parameters():
                            parameter.requires_grad_(False)
    set_modes(model, stage)


def set_modes(model: Classifier, stage: StageConfig) -> None:
    """Training mode for the trained parts only.

    A frozen BatchNorm must be in eval mode, or its running statistics drift whatever
    ``requires_grad`` says (Lightning #13902, accelerate #1347). Call it after anything that may
    have changed modes, such as an evaluation.
    """
    chosen = trainable_parts(model, stage)
    model.train()
    # with the trunk frozen, also its layers without parameters, such as a dropout of its own
    model.trunk.train(bool(chosen - {"head"}))
    for name, modules in parts_of(model).items():
        for module in modules:
            module.train(name in chosen)
            if stage.batchnorm == "frozen":
                for layer in module.modules():
                    if isinstance(layer, _BatchNorm):
                        layer.eval()


def batchnorm_learns(model: Classifier, stage: StageConfig) -> bool:
    """Whether some BatchNorm layer takes its statistics from the microbatches of a stage."""
    chosen = trainable_parts(model, stage)
    return stage.batchnorm != "frozen" and any(
        isinstance(layer, _BatchNorm)
        for name, modules in parts_of(model).items()
        if name in chosen
        for module in modules
        for layer in module.modules()
    )


def frozen_tensors(model: Classifier) -> dict[str, torch.Tensor]:
    """All that must not move in this stage: parameters without gradient, and the buffers of layers
    that are not in training mode."""
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    for prefix, module in model.named_modules():
        if not module.training:
            for name, buffer in module.named_buffers(prefix, recurse=False):
                frozen[name] = buffer
    return frozen


def trainable_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def parameters_without_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    return [name for name, p in parameters if p.requires_grad and p.grad is None]
