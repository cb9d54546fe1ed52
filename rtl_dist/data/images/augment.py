"""Image bytes to what the network sees: the keyed training augmentation and the evaluation view."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from rtl_dist.config import AugmentConfig, ResolvedStage
from rtl_dist.core.keys import GOLDEN, Stream, mix64, stream_keys
from rtl_dist.data.images.decode import decode
from rtl_dist.data.images.middle import enlarged_middle
from rtl_dist.data.images.region import decode_region, region_size
from rtl_dist.data.images.tiny import TinyView, is_tiny

MOST_ENLARGED = 1 << 24  # pixels of an image made as a whole, to look at its middle


class Transform(Protocol):
    """What becomes of an image file."""

    image_size: int
    """Side of the square that it becomes, in pixels."""
    channels: int
    """3: colour. 1: grey."""

    def __call__(self, content: bytes, key: int) -> torch.Tensor:
        """An image file's bytes to uint8 (channels, image_size, image_size).

        Raises:
            DataError: the bytes are not a whole, decodable image.
        """


class TrainTransform:
    """A crop, resized, and torchvision's v2 transforms, drawing from a generator seeded for each
    sample: the pixels that ``v2.Compose`` would make of the whole image.

    The key is all the randomness there is, so the pixels do not depend on the process, the worker
    or what was decoded before.
    """

    def __init__(self, augment: AugmentConfig, *, image_size: int, channels: int) -> None:
        self.image_size, self.channels = image_size, channels
        self._crop = _RandomCrop(augment.crop_scale, augment.crop_ratio)
        self._hflip, self._vflip = augment.hflip, augment.vflip
        steps: list[torch.nn.Module] = []
        if augment.rotation:
            steps.append(v2.RandomRotation(augment.rotation, v2.InterpolationMode.BILINEAR))
        if augment.randaugment is not None:
            steps.append(v2.RandAugment(num_ops=2, magnitude=augment.randaugment))
        if augment.color_jitter:
            strength = augment.color_jitter
            steps.append(v2.ColorJitter(strength, strength, strength))
        if augment.erasing:
            steps.append(v2.RandomErasing(augment.erasing))
        self._rest = v2.Compose(steps) if steps else None

    def __call__(self, content: bytes, key: int) -> torch.Tensor:
        """See ``Transform``; ``key`` is that of ``augmentation_keys``."""
        pixels, hflip, vflip = self._draw(content, key)
        view = _resize(pixels, self.image_size)
        if hflip:
            view = view.flip(-1)
        if vflip:
            view = view.flip(-2)
        if self._rest is not None:
            view = self._rest(view)
        return view

    def tiny(self, content: bytes, key: int) -> TinyView | None:
        """What ``enlarge`` makes the same view of; None if that is not worth it, or not enough.

        Raises:
            DataError: the bytes are not a whole, decodable image.
        """
        if self._rest is not None:
            return None
        pixels, hflip, vflip = self._draw(content, key)
        if not is_tiny(pixels, self.image_size):
            return None
        return TinyView(pixels, hflip, vflip)

    def _draw(self, content: bytes, key: int) -> tuple[torch.Tensor, bool, bool]:
        """The crop's pixels, and which flips come after."""
        torch.default_generator.manual_seed(key)
        pixels = self._decode_crop(content)
        hflip = bool(self._hflip and torch.rand(1) < self._hflip)
        vflip = bool(self._vflip and torch.rand(1) < self._vflip)
        return pixels, hflip, vflip

    def _decode_crop(self, content: bytes) -> torch.Tensor:
        """The pixels of a crop that is drawn here; what lies outside it is decoded only if it has
        to be."""
        size = region_size(content)
        if size is not None:
            crop = self._crop.draw(*size)
            pixels = decode_region(content, *crop, self.channels)
            if pixels is not None:
                return pixels
        image = decode(content, self.channels)
        if size is None:
            crop = self._crop.draw(image.shape[1], image.shape[2])
        top, left, height, width = crop
        return image[:, top : top + height, left : left + width]


def training_transform(stage: ResolvedStage, *, channels: int) -> TrainTransform:
    """How a stage looks at an image that it trains on."""
    return TrainTransform(stage.augment, image_size=stage.image_size, channels=channels)


class EvalTransform:
    """Resize the short side to ``image_size / crop_pct`` (rounded down as timm does; bilinear,
    antialiased), centre crop."""

    def __init__(self, *, image_size: int, crop_pct: float, channels: int) -> None:
        self.image_size, self.channels, self.crop_pct = image_size, channels, crop_pct
        self._short_side = math.floor(image_size / crop_pct)
        resize = v2.Resize(self._short_side, antialias=True)
        self._transform = v2.Compose([resize, v2.CenterCrop(image_size)])

    def __call__(self, content: bytes, key: int) -> torch.Tensor:
        """See ``Transform``; ``key`` changes nothing."""
        return self.of_pixels(decode(content, self.channels))

    def of_pixels(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (channels, height, width) to uint8 (channels, image_size, image_size)."""
        height, width = image.shape[1:]
        short = min(height, width)
        size = [int(self._short_side * side / short) for side in (height, width)]
        if short < self._short_side and size[0] * size[1] > MOST_ENLARGED:
            return enlarged_middle(image, (size[0], size[1]), self.image_size)
        view: torch.Tensor = self._transform(image)
        return view


class _RandomCrop:
    """``v2.RandomResizedCrop.make_params``, draw by draw, without the image and at half the cost
    (some 4 % of an image's)."""

    def __init__(self, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        self._scale, self._ratio = scale, ratio
        self._log_ratio = torch.log(torch.tensor(ratio)).tolist()

    def draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop of an image of this size."""
        number = torch.empty(1)
        for _ in range(10):
            area = height * width * number.uniform_(*self._scale).item()
            ratio = number.uniform_(*self._log_ratio).exp_().item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = torch.randint(height - h + 1, (1,)).item()
                return int(top), int(torch.randint(width - w + 1, (1,)).item()), h, w
        lowest, highest = self._ratio
        h, w = height, width  # none fits: the middle, as near to the ratios as can be
        if width / height < lowest:
            h = max(1, round(width / lowest))
        elif width / height > highest:
            w = max(1, round(height * highest))
        return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (C, h, w) to uint8 (C, side, side), bilinear and antialiased.

    As ``v2.functional.resize`` does, but in whole numbers on every CPU, where that rounds
    differently on one without AVX2; and with values interleaved, for which there is a quick path.
    """
    pixels = image.permute(1, 2, 0).contiguous()  # a region's already are
    batch = pixels[None].permute(0, 3, 1, 2)
    return interpolate(batch, size=[side, side], mode="bilinear", antialias=True)[0]


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
    bases = stream_keys(seed, Stream.AUGMENTATION, cycle)
    numbers = samples.astype(np.uint64) + np.uint64(1)
    keys = mix64(bases ^ mix64(numbers * GOLDEN))
    return (keys >> np.uint64(1)).astype(np.int64)
