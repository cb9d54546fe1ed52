"""The middle of an enlarged image, without the rest of it.

A strip of 3000 x 1 pixels whose short side becomes 256 is 768,000 wide, of which an evaluation
looks at 224.
"""

from __future__ import annotations

import numpy as np
import torch

from rtl_dist.data.images.enlarging import BITS, taps


def enlarged_middle(image: torch.Tensor, size: tuple[int, int], side: int) -> torch.Tensor:
    """uint8 (C, side, side): the middle of an image resized to ``size``, bilinear and antialiased,
    to the last bit.

    Args:
        image: uint8 (C, h, w).
        size: (height, width) in pixels, each more than the image's and at least ``side``.
        side: of the square, in pixels.
    """
    starts = [round((full - side) / 2) for full in size]
    rows, columns = (
        taps(have, full, start, side)
        for have, full, start in zip(image.shape[1:], size, starts, strict=True)
    )
    top = int(rows.first[0])
    seen = image[:, top : int(rows.first[-1]) + 2].numpy()
    wide = _line(seen, columns.first, columns.weights)
    tall = _line(wide.swapaxes(1, 2), rows.first - top, rows.weights).swapaxes(1, 2)
    return torch.from_numpy(np.ascontiguousarray(tall))


def _line(pixels: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint8 (C, n, m) to (C, n, S)."""
    second = np.minimum(first + 1, pixels.shape[2] - 1)
    total = pixels[:, :, first] * weights[0] + pixels[:, :, second] * weights[1]
    return ((total + (1 << BITS - 1)) >> BITS).clip(0, 255).astype(np.uint8)
