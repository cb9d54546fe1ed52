"""Images much smaller than what the network sees travel small and are enlarged on the device.

A 32 x 32 image is 3 KB, its 224 x 224 view 150 KB. The GPU makes from the one what a worker would
have made, to the last bit: the resize of torch for uint8 on a CPU (and Pillow's, from which it
comes) works in whole numbers, which come out the same anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rtl_dist.data.images.enlarging import BITS, TAPS, taps


class TinyView(NamedTuple):
    """A crop before it is resized."""

    pixels: torch.Tensor
    """uint8 (C, h, w)."""
    hflip: bool
    """Whether it is mirrored afterwards, left to right."""
    vflip: bool
    """The same, top to bottom."""


class TinyBatch(NamedTuple):
    """The crops of a microbatch."""

    pixels: torch.Tensor
    """uint8 (n, C, H, W), each crop in its upper left corner."""
    shapes: np.ndarray
    """int64 (n, 4): height, width, hflip, vflip of each; the former two in pixels."""


def is_tiny(pixels: torch.Tensor, image_size: int) -> bool:
    """Whether uint8 (C, h, w) pixels are worth sending as they are."""
    return 2 * max(pixels.shape[-2:]) <= image_size


def gather_tiny(views: Sequence[TinyView], out: torch.Tensor) -> TinyBatch:
    """Writes the crops into the first bytes of ``out``, contiguous uint8, large enough."""
    height = max(view.pixels.shape[1] for view in views)
    width = max(view.pixels.shape[2] for view in views)
    shape = (len(views), views[0].pixels.shape[0], height, width)
    pixels = out.view(-1)[: int(np.prod(shape))].view(shape)
    for i, view in enumerate(views):
        _, h, w = view.pixels.shape
        pixels[i, :, :h, :w] = view.pixels
    shapes = [(*view.pixels.shape[1:], view.hflip, view.vflip) for view in views]
    return TinyBatch(pixels, np.array(shapes, dtype=np.int64))


def enlarge(batch: TinyBatch, image_size: int) -> torch.Tensor:
    """The views, uint8 (n, C, image_size, image_size), on the device of ``batch.pixels``: resized
    (bilinear, as ``interpolate(..., antialias=True)`` of uint8 on a CPU), then flipped."""
    heights, widths, hflips, vflips = batch.shapes.T
    rows = _enlarge_width(batch.pixels, widths, hflips, image_size)
    columns = _enlarge_width(rows.transpose(2, 3), heights, vflips, image_size)
    return columns.transpose(2, 3).contiguous()


def _enlarge_width(
    pixels: torch.Tensor, sizes: np.ndarray, flips: np.ndarray, image_size: int
) -> torch.Tensor:
    """uint8 (n, C, H, W), of which ``sizes`` columns count, to uint8 (n, C, H, image_size)."""
    tables = [taps(int(size), image_size, 0, image_size) for size in sizes]
    first = np.stack([table.first for table in tables])
    weights = np.stack([table.weights for table in tables])
    flipped = flips.astype(bool)
    first[flipped] = first[flipped, ::-1]
    weights[flipped] = weights[flipped, :, ::-1]
    device, (n, channels, height, _) = pixels.device, pixels.shape
    shape = (n, channels, height, image_size)
    total = torch.full(shape, 1 << BITS - 1, dtype=torch.int32, device=device)
    for tap in range(TAPS):
        # a second tap beyond the edge has weight 0
        columns = np.minimum(first + tap, (sizes - 1)[:, None])
        at = torch.from_numpy(columns).to(device, non_blocking=True)[:, None, None].expand(shape)
        weight = torch.from_numpy(weights[:, tap].copy()).to(device, non_blocking=True)
        total = total + pixels.gather(3, at).to(torch.int32) * weight[:, None, None]
    return (total >> BITS).clamp_(0, 255).to(torch.uint8)
