"""Pictures that can be decoded, but perhaps not to what they show."""

from __future__ import annotations

import math

import numpy as np
import torch

from rtl_dist.data.images.decode import Decoded

_FEW_LEVELS = 16  # of 256
_DARK_16_BIT = 64
_LOOKED_AT = 1 << 20  # values, of a large picture
_ALMOST_ALL = 0.99  # text and dead pixels are as bright as can be


def doubt_of(image: Decoded) -> str:
    """What speaks against its pixels, to be put behind the file's name; empty if nothing does."""
    if image.warning:
        return f"may have lost a part of its picture: its decoder says {image.warning!r}"
    low, high = (int(value) for value in image.pixels.aminmax())
    if image.header.depth == 16 and 0 < (bright := _bright(image.pixels)) < _DARK_16_BIT:
        bits = 8 + bright.bit_length()
        return (
            f"comes out nearly black: (almost) all its 16-bit values use {bits} bits at most, and"
            f" the upper 8 of 16 are taken; multiply them by {1 << 16 - bits} where it was made"
        )
    if high - low < _FEW_LEVELS:
        return f"comes out (nearly) in one colour: all its values are {low} to {high} of 255"
    return ""


def _bright(pixels: torch.Tensor) -> int:
    """What almost all pixels are no brighter than."""
    step = math.ceil(math.sqrt(pixels.numel() / _LOOKED_AT))
    some = pixels[:, ::step, ::step].numpy()
    reached = np.bincount(some.ravel(), minlength=256).cumsum()
    return int(np.searchsorted(reached, _ALMOST_ALL * reached[-1]))
