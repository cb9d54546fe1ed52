"""An export compared with its model, from file bytes to probabilities, before anybody gets it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rtl_dist.core.errors import RtlDistError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import brief
from rtl_dist.data.images.decode import decode
from rtl_dist.evaluation.logits import eval_transform
from rtl_dist.inference.export.graphs import BatchGraph
from rtl_dist.inference.export.parting import first_difference
from rtl_dist.inference.export.real_images import RealImages, as_cameras_store, odd_sizes
from rtl_dist.inference.export.runner import Runner
from rtl_dist.model.folder import LoadedModel

BATCH_SIZES = (1, 2, 7)
_IN_SMALL_BATCHES = 14  # images; the last size gets all


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an export may be from its model."""

    views: float
    """Largest difference of a probability, of the same pixels."""
    images: float
    """The same from decoded images, where others than ours may resize."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Parity:
    """An export that agrees with its model."""

    num_images: int
    """Real images, as they are stored."""
    num_more: int
    """Made of them: odd sizes, grey files, files turned by EXIF."""
    num_ties: int
    """Of all: the model's first two classes are as near as the tolerance, and another came first.
    """
    max_difference: float
    """Of a probability, of all images."""
    max_difference_views: float
    """Of a probability, of views in batches."""
    tolerance: Tolerance
    """That was kept to."""
    wanted: np.ndarray
    """float32 (num_images, K): the model's."""
    found: np.ndarray
    """float32 (num_images, K): the export's."""


class Original:
    """The model itself, in float32 on the CPU, by the path that evaluations take."""

    def __init__(self, loaded: LoadedModel, graph: BatchGraph) -> None:
        """graph: whose network is computed, so that the loaded one stays where it is."""
        self.loaded, self.graph = loaded, graph
        self.transform = eval_transform(loaded.model)

    @torch.inference_mode()
    def of_views(self, views: torch.Tensor) -> np.ndarray:
        """uint8 (N, C, S, S) to float32 (N, K)."""
        logits = self.graph.classifier(views)
        return self.loaded.calibration.probabilities(logits, self.loaded.task).numpy()

    def of_image(self, image: torch.Tensor) -> np.ndarray:
        """uint8 (C, H, W) of any size to float32 (K,)."""
        return self.of_views(self.transform.of_pixels(image)[None])[0]


class NotTheSame(RtlDistError):
    """An export does not say what its model says."""


def require_parity(
    runner: Runner, original: Original, images: RealImages, tolerance: Tolerance, what: str
) -> Parity:
    """
    Args:
        what: the export, for people.

    Raises:
        NotTheSame: names the image and the layer where they part.
        DataError: an image is damaged.
    """
    channels = original.transform.channels
    compare = _Comparison(runner, original, tolerance.images, what)
    wanted, found, views = [], [], []
    for name, content in zip(images.names, images.files, strict=True):
        pixels = decode(content, channels)
        one, other = compare(name, pixels)
        wanted.append(one)
        found.append(other)
        views.append(original.transform.of_pixels(pixels))
    num_more = 0
    for name, pixels in _more(images, channels):
        compare(name, pixels)
        num_more += 1
    largest = require_batches(runner, np.stack(wanted), torch.stack(views), tolerance.views, what)
    return Parity(
        num_images=len(images),
        num_more=num_more,
        num_ties=compare.num_ties,
        max_difference=compare.largest,
        max_difference_views=largest,
        tolerance=tolerance,
        wanted=np.stack(wanted),
        found=np.stack(found),
    )


def _more(images: RealImages, channels: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from odd_sizes(images, channels)
    for name, content in as_cameras_store(images):
        yield name, decode(content, channels)


class _Comparison:
    """Compares image by image, and keeps the largest difference."""

    def __init__(self, runner: Runner, original: Original, tolerance: float, what: str) -> None:
        self.runner, self.original, self.tolerance, self.what = runner, original, tolerance, what
        self.largest, self.num_ties = 0.0, 0

    def __call__(self, name: str, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        wanted = self.original.of_image(image)
        try:
            found = self.runner.of_image(image)
        except Exception as error:  # a runtime's own
            size = f"{image.shape[2]} x {image.shape[1]}"
            raise NotTheSame(
                f"{self.what} does not take {name} ({size} pixels):"
                f" {brief(' '.join(str(error).split()))}. Nothing was written"
            ) from error
        difference = difference_of(found, wanted)
        if not difference <= self.tolerance or self._other_class(wanted, found):
            raise self._parted(name, image, wanted, found)
        self.largest = max(self.largest, difference)
        return wanted, found

    def _parted(
        self, name: str, image: torch.Tensor, wanted: np.ndarray, found: np.ndarray
    ) -> NotTheSame:
        does_not = f"{self.what} does not say what the model says: of {name} it gives"
        if found.shape != wanted.shape:
            return NotTheSame(
                f"{does_not} {found.size:,} probabilities, the model {wanted.size:,}. Nothing was"
                " written"
            )
        where = first_difference(self.runner, self.original.graph, self.original.transform, image)
        # the first that is no number counts most
        worst = int(np.abs(found - wanted).argmax())
        label = self.original.loaded.classes[worst]
        return NotTheSame(
            f"{does_not} {label!r} {found[worst]:.6f}, the model {wanted[worst]:.6f} (tolerance"
            f" {self.tolerance:g}); they part at {where}. Nothing was written"
        )

    def _other_class(self, wanted: np.ndarray, found: np.ndarray) -> bool:
        """Whether another class comes first, and not because two are equal but for rounding."""
        if self.original.loaded.task == MULTI_LABEL:
            return False
        one, other = int(wanted.argmax()), int(found.argmax())
        if one == other:
            return False
        self.num_ties += 1
        return bool(wanted[one] - wanted[other] > self.tolerance)


def require_batches(
    runner: Runner, wanted: np.ndarray, views: torch.Tensor, tolerance: float, what: str
) -> float:
    """The largest difference in batches of ``BATCH_SIZES``. Raises NotTheSame: it is larger than
    ``tolerance``."""
    largest = 0.0
    for size in BATCH_SIZES:
        count = len(views) if size == BATCH_SIZES[-1] else min(len(views), _IN_SMALL_BATCHES)
        for first in range(0, count, size):
            found = runner.of_views(views[first : first + size])
            difference = difference_of(found, wanted[first : first + size])
            if not difference <= tolerance:
                raise NotTheSame(
                    f"{what} says something else in batches: of {size}, from image {first + 1} on,"
                    f" it is {difference:.3g} off (tolerance {tolerance:g}). Nothing was written"
                )
            largest = max(largest, difference)
    return largest


def difference_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest; infinite where shapes differ, not a number where one is none."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - wanted).max())
