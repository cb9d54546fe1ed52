"""What happens to a decoded image: the keyed training augmentation and the evaluation view."""

from __future__ import annotations

import math

import numpy as np
import torch
from torchvision.transforms import v2

from rtl_dist.config import Augment
from rtl_dist.data.order import derive_key, mix64

_AUGMENT_STREAM = 1  # keeps these keys apart from those of the data order


class TrainTransform:
    """torchvision's v2 transforms, drawing from a generator seeded for each sample.

    The key is all the randomness there is, so the pixels do not depend on the process, the worker
    or what was decoded before.
    """

    def __init__(self, augment: Augment, *, image_size: int) -> None:
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(
                image_size, scale=augment.crop_scale, ratio=augment.crop_ratio, antialias=True
            )
        ]
        if augment.hflip:
            steps.append(v2.RandomHorizontalFlip(augment.hflip))
        if augment.vflip:
            steps.append(v2.RandomVerticalFlip(augment.vflip))
        if augment.rotation:
            steps.append(v2.RandomRotation(augment.rotation, v2.InterpolationMode.BILINEAR))
        if augment.randaugment is not None:
            steps.append(v2.RandAugment(num_ops=2, magnitude=augment.randaugment))
        if augment.color_jitter:
            strength = augment.color_jitter
            steps.append(v2.ColorJitter(strength, strength, strength))
        if augment.erasing:
            steps.append(v2.RandomErasing(augment.erasing))
        self._transform = v2.Compose(steps)

    def __call__(self, image: torch.Tensor, key: int) -> torch.Tensor:
        """uint8 (C, H, W) to uint8 (C, image_size, image_size)."""
        torch.default_generator.manual_seed(key)
        view: torch.Tensor = self._transform(image)
        return view


class EvalTransform:
    """Resize the short side to ``image_size / crop_pct`` (rounded down as timm does; bilinear,
    antialiased), centre crop."""

    def __init__(self, *, image_size: int, crop_pct: float) -> None:
        resize = v2.Resize(math.floor(image_size / crop_pct), antialias=True)
        self._transform = v2.Compose([resize, v2.CenterCrop(image_size)])

    def __call__(self, image: torch.Tensor, key: int) -> torch.Tensor:
        """uint8 (C, H, W) to uint8 (C, image_size, image_size); ``key`` changes nothing."""
        view: torch.Tensor = self._transform(image)
        return view


def augmentation_keys(
    samples: np.ndarray, epochs: np.ndarray, *, seed: int, views: int | None
) -> np.ndarray:
    """One 63-bit key a sample, from (seed, view, sample), where a view is an epoch unless
    ``views`` makes the epochs cycle through that many.

    Args:
        samples: int64 (n,).
        epochs: int64 (n,).

    Returns:
        int64 (n,), not negative.
    """
    cycle = epochs if views is None else epochs % views
    keys = np.empty(len(samples), dtype=np.uint64)
    for view in np.unique(cycle):
        chosen = cycle == view
        base = np.uint64(derive_key(seed, _AUGMENT_STREAM, int(view)))
        numbers = samples[chosen].astype(np.uint64) + np.uint64(1)
        keys[chosen] = mix64(base ^ mix64(numbers * np.uint64(0x9E3779B97F4A7C15)))
    return (keys >> np.uint64(1)).astype(np.int64)
