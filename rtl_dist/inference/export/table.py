"""Formats side by side: size, accuracy, time an image, and how far they are from the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rtl_dist.core.text import readable_size

_TIMED = 30  # images


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form of a model."""

    name: str
    """For people."""
    size: int
    """Bytes on disk, of what takes an image; of a folder all of it."""
    metric: float | None
    """The task's headline on the images of the check; None: they have no labels."""
    ms_an_image: float
    """Milliseconds, median, one decoded image at a time, preprocessing included."""
    max_difference: float | None
    """Of a probability, from the model's, on all images of the check; None: it is the model."""


def ms_an_image(
    of_image: Callable[[torch.Tensor], np.ndarray], images: list[torch.Tensor]
) -> float:
    """Of decoded images uint8 (C, H, W), with torch's number of threads."""
    times = []
    of_image(images[0])  # first calls make plans
    for image in images[:_TIMED]:
        begun = time.perf_counter()
        of_image(image)
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def table_of(rows: list[Row], metric: str) -> str:
    """For a terminal."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'size':>9}  {metric:>8}  ms an image  max difference"]
    for row in rows:
        scored = "-" if row.metric is None else f"{row.metric:.4f}"
        apart = "" if row.max_difference is None else f"{row.max_difference:.1e}"
        lines.append(
            f"{row.name:{width}}  {readable_size(row.size):>9}  {scored:>8}"
            f"  {row.ms_an_image:>11.1f}  {apart:>14}"
        )
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [vars(row) for row in rows]
