"""The evaluation's view of an image as a graph: resized, antialiased, and its middle cut out.

torch resizes uint8 on a CPU in whole numbers (``UpSampleKernel.cpp``, after Pillow's), so every
runtime can make the same pixels, to the last bit: sums of products of whole numbers, exact in
float64. Each line of the view is a weighted sum of neighbouring lines of the image. Weights of
``GROUP`` lines at a time are one matrix, over all the lines that any of them needs: few enough
multiplications for a photograph of any size, and few enough operations for a graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

GROUP = 16  # lines of the view made by one matrix
_MOST_BITS = 22  # of a weight, in torch
_F64, _I64 = torch.float64, torch.int64


class _Lines(NamedTuple):
    """How lines of the view are made of the image's: of rows first, of columns second."""

    sources: torch.Tensor
    """int64 (2, G, L): which lines of the image each group of ``GROUP`` looks at."""
    weights: torch.Tensor
    """float64 (2, G, GROUP, L): whole numbers, in units of 1 / ``unit``."""
    unit: torch.Tensor
    """float64 (2,): a power of two."""


class View(nn.Module):
    """uint8 (H, W, C), any H and W, to uint8 (1, S, S, C): the pixels of ``EvalTransform``.

    Has no other size than H and W in it, so it can be exported with those left open.
    """

    def __init__(self, *, image_size: int, crop_pct: float) -> None:
        super().__init__()
        self.image_size = image_size
        self.short_side = math.floor(image_size / crop_pct)
        self.num_groups = -(-image_size // GROUP)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width, channels = image.shape
        lines = self._lines(height, width)
        rows, columns = lines.sources.flatten(1)
        seen = image.index_select(0, rows)  # (G L, W, C)
        across = seen.transpose(0, 1).index_select(0, columns)  # (G L of columns, G L of rows, C)
        wide = self._mixed(across, lines, 1)  # (S, G L of rows, C)
        tall = self._mixed(wide.transpose(0, 1), lines, 0)
        return tall.reshape(1, self.image_size, self.image_size, channels)

    def _lines(self, height: int, width: int) -> _Lines:
        shorter, longer = torch.sym_min(height, width), torch.sym_max(height, width)
        sizes = torch.stack([torch.scalar_tensor(n, dtype=_F64) for n in (height, width)])
        resized = (sizes * self.short_side / sizes.min()).floor()
        scale, last_pixel = sizes / resized, sizes[:, None] - 1
        reach = scale.clamp(min=1)

        def weigh(at: torch.Tensor, count: int | torch.SymInt) -> tuple[torch.Tensor, torch.Tensor]:
            """Of lines of the resized image (2, n, k): the first ``count`` source lines from that
            of the first of k on (2, n, count), and their weights (2, n, k, count)."""
            each = (slice(None), None, None)
            centre = (at + 0.5) * scale[each]
            first = (centre - reach[each] + 0.5).floor().clamp(min=0)
            after = torch.minimum((centre + reach[each] + 0.5).floor(), sizes[each])
            source = first[:, :, :1] + torch.arange(count, dtype=_F64)  # (2, n, count)
            x = source[:, :, None]
            far = (x - centre[..., None] + 0.5).abs() / reach[:, None, None, None]
            weight = (1 - far).clamp(min=0)
            is_near = (x >= first[..., None]) & (x < after[..., None])
            weight = torch.where(is_near, weight, torch.zeros_like(weight))
            return source, weight / weight.sum(-1, keepdim=True)

        # a line's scale exceeds that of the shorter side by less than this, as sizes are floored
        most = max(self.short_side - 1, 1)
        # of an enlarged line, which may be long, the largest weight is 1, at its beginning
        at_least = longer * (shorter // self.short_side) + 2  # torch takes 1 for another case
        count = torch.sym_min(self.short_side * longer // shorter, at_least)
        every = torch.arange(count, dtype=_F64)
        every = torch.minimum(every, resized[:, None] - 1)[..., None]
        largest = weigh(every, 2 * (shorter // most + 2) + 1)[1].flatten(1).amax(1)
        powers = 2.0 ** torch.arange(1, _MOST_BITS + 1, dtype=_F64)
        fits = (largest[:, None] * powers + 0.5).floor() < 2.0**15
        unit = 2.0 ** fits.to(_F64).sum(1)

        line = torch.arange(self.num_groups * GROUP, dtype=_F64).clamp(max=self.image_size - 1)
        start = ((resized - self.image_size) / 2).round()
        at = (line + start[:, None]).unflatten(1, (self.num_groups, GROUP))
        source, weight = weigh(at, (GROUP + 1) * shorter // most + 6)
        sources = torch.minimum(source, last_pixel[..., None]).to(_I64)
        return _Lines(sources, (weight * unit[:, None, None, None] + 0.5).floor(), unit)

    def _mixed(self, lines: torch.Tensor, how: _Lines, axis: int) -> torch.Tensor:
        """uint8 (G L, n, C) to (S, n, C)."""
        count, channels = lines.shape[1:]
        groups = lines.reshape(self.num_groups, -1, count * channels).to(_F64)
        unit = how.unit[axis]
        total = how.weights[axis] @ groups
        rounded = ((total + unit / 2) / unit).floor().clamp(0, 255).to(torch.uint8)
        return rounded.reshape(self.num_groups * GROUP, count, channels)[: self.image_size]
