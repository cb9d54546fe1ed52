"""The training stream read from cached views instead of image files."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from rtl_dist.data.format.split import Split
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.features.view import View, as_features


@dataclass(frozen=True, kw_only=True)
class ViewMicrobatches:
    """The microbatches that ``TrainingMicrobatches`` would yield, as features."""

    views: dict[int, View]
    """Those that will be needed, by number: in epoch e, view e modulo ``num_views``."""
    num_views: int
    """How many views a sample cycles through."""
    order: TrainingStream
    """Which sample is at which position."""
    split: Split
    """Whose samples and labels they are."""
    size: int
    """Samples of a microbatch."""

    @property
    def bad(self) -> list[str]:
        """What each damaged sample met when the views were made suffers from."""
        return [name for view in self.views.values() for name in view.bad]

    @property
    def row_bytes(self) -> int:
        """Of the features of one sample."""
        return int(self._any_view.rows.shape[1])

    def gather(self, position: int, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies the features at a position of the stream; returns their labels, see
        ``Split.labels``, and the samples that they really are of, int64 (n,).

        Args:
            out: uint8 (size, row_bytes).
        """
        samples, epochs = self.order.samples_at(position, self.size)
        numbers = epochs % self.num_views
        used = np.empty_like(samples)
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), self.size]
        for start, end in itertools.pairwise(edges):
            view, wanted = self.views[int(numbers[start])], samples[start:end]
            view.ask_for(wanted)
            # "clip", because numpy would copy first to be able to complain
            np.take(view.rows, wanted, axis=0, out=out[start:end], mode="clip")
            used[start:end] = view.used.numpy()[wanted]
        return self.split.labels(used), used

    def as_features(self, rows: torch.Tensor) -> torch.Tensor:
        """What gathered rows are, (n, ...), in the same memory."""
        features = self._any_view.features
        return as_features(rows, tuple(features.shape[1:]), features.dtype)

    @property
    def _any_view(self) -> View:
        return next(iter(self.views.values()))


def views_of_stage(
    num_views: int, *, first_step: int, end_step: int, global_batch_size: int, num_samples: int
) -> tuple[int, ...]:
    """Which views of its cycle the steps of a stage touch, each sample coming once an epoch."""
    first = first_step * global_batch_size // num_samples
    last = (end_step * global_batch_size - 1) // num_samples
    last = min(last, first + num_views - 1)
    return tuple(sorted({epoch % num_views for epoch in range(first, last + 1)}))
