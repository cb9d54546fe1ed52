"""What is found out about an export before it is published: whether it is right, its figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.data.images.decode import decode
from rtl_dist.evaluation.metrics import compute_metrics
from rtl_dist.evaluation.predictions import Predictions
from rtl_dist.inference.export.parity import (
    NotTheSame,
    Original,
    Parity,
    Tolerance,
    difference_of,
    require_batches,
    require_parity,
)
from rtl_dist.inference.export.real_images import RealImages
from rtl_dist.inference.export.runner import Runner
from rtl_dist.inference.export.table import Row, ms_an_image

_TIMED = 30  # images
_LEVEL = 1e-3  # of a probability of 8 bits, alone or in a batch: rounding may move a level

GRAPH = Tolerance(views=1e-4, images=1e-4)
"""Of graphs that resize as we do, to the last bit: rounding of float32 in the network."""
FOLDER = Tolerance(views=1e-4, images=0.02)
"""Of folders that timm and transformers load, which resize by Pillow: a level of 255 here and
there."""


class Checking:
    """Of all forms of a model, on the same images."""

    def __init__(self, original: Original, images: RealImages) -> None:
        self.original, self.images = original, images
        self.parity: Parity | None = None
        channels = original.transform.channels
        self._timed = [decode(content, channels) for content in images.files[:_TIMED]]

    def right(self, runner: Runner, tolerance: Tolerance, *, name: str, size: int) -> Row:
        """Of an export that must say what the model says. Raises as ``require_parity``."""
        self.parity = require_parity(runner, self.original, self.images, tolerance, name)
        return Row(
            name=name,
            size=size,
            metric=self._metric(self.parity.found),
            ms_an_image=ms_an_image(runner.of_image, self._timed),
            max_difference=self.parity.max_difference,
        )

    def near(self, runner: Runner, most_loss: float, *, name: str, size: int) -> Row:
        """Of an export that may say something else, as long as it is right about as often.

        Raises:
            NotTheSame: it is right less often.
        """
        assert self.parity is not None
        channels = self.original.transform.channels
        images = [decode(file, channels) for file in self.images.files]
        found = np.stack([runner.of_image(image) for image in images])
        views = torch.stack([self.original.transform.of_pixels(image) for image in images])
        require_batches(runner, found, views, _LEVEL, name)
        metric, before = self._metric(found), self._metric(self.parity.wanted)
        assert metric is not None
        assert before is not None
        if not before - metric <= most_loss:
            raise NotTheSame(
                f"{name} loses {before - metric:.4f} of {self.metric_name} ({before:.4f} ->"
                f" {metric:.4f} on {len(self.images):,} images), more than --int8-loss"
                f" {most_loss:g}. Nothing was written"
            )
        return Row(
            name=name,
            size=size,
            metric=metric,
            ms_an_image=ms_an_image(runner.of_image, self._timed),
            max_difference=difference_of(found, self.parity.wanted),
        )

    def of_model(self, size: int) -> Row:
        """Of the model itself, by torch; after an export of it was found right."""
        assert self.parity is not None
        return Row(
            name="model (torch)",
            size=size,
            metric=self._metric(self.parity.wanted),
            ms_an_image=ms_an_image(self.original.of_image, self._timed),
            max_difference=None,
        )

    @property
    def metric_name(self) -> str:
        return self.original.loaded.task.headline

    def scored(self) -> Predictions | None:
        """What the export that was found right says of labelled images; None: there are none."""
        assert self.parity is not None
        return None if self.images.labels is None else self._predictions(self.parity.found)

    def _metric(self, scores: np.ndarray) -> float | None:
        if self.images.labels is None:
            return None
        return compute_metrics(self._predictions(scores))[self.metric_name]

    def _predictions(self, scores: np.ndarray) -> Predictions:
        loaded, labels = self.original.loaded, self.images.labels
        assert labels is not None
        return Predictions(
            task=loaded.task,
            classes=loaded.classes,
            labels=labels.astype(np.uint8) if loaded.task == MULTI_LABEL else labels,
            scores=scores,
            calibration=loaded.calibration,
        )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
