"""Mixup and CutMix of one microbatch, drawn from the generator seeded for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchvision.transforms import v2

from rtl_dist.config import AugmentConfig

Mixer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def make_mixer(augment: AugmentConfig, *, num_classes: int) -> Mixer:
    """(images (n, C, S, S), int64 labels (n,)) to mixed images and class probabilities
    (n, num_classes); or both unchanged, where the config mixes nothing."""
    choices: list[torch.nn.Module] = []
    if augment.mixup > 0:
        choices.append(v2.MixUp(alpha=augment.mixup, num_classes=num_classes))
    if augment.cutmix > 0:
        choices.append(v2.CutMix(alpha=augment.cutmix, num_classes=num_classes))
    if not choices:
        return lambda images, labels: (images, labels)
    transform = v2.RandomChoice(choices)

    def mix(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed: tuple[torch.Tensor, torch.Tensor] = transform(images.float(), labels)
        return mixed

    return mix
