"""The training stream read from cached views instead of image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rtl_dist.data.format.split import Split
from rtl_dist.data.loading.batch import Batch
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.features.view_files import View


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

    def at(self, positions: Iterable[int]) -> Iterator[Batch]:
        """The microbatches at these positions of the stream, on the host."""
        for position in positions:
            samples, epochs = self.order.samples_at(position, self.size)
            numbers = epochs % self.num_views
            inputs: torch.Tensor | None = None
            used = np.empty_like(samples)
            for number in np.unique(numbers):
                view, chosen = self.views[int(number)], numbers == number
                rows = torch.from_numpy(samples[chosen])
                features = view.features[rows]
                if inputs is None:
                    inputs = features.new_empty((self.size, *features.shape[1:]))
                inputs[torch.from_numpy(chosen)] = features
                used[chosen] = view.used[rows].numpy()
            assert inputs is not None
            labels = torch.from_numpy(self.split.labels(used))
            if inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield Batch(inputs, labels, torch.from_numpy(used), [])


def views_of_stage(
    num_views: int, *, first_step: int, end_step: int, global_batch_size: int, num_samples: int
) -> tuple[int, ...]:
    """Which views of its cycle the steps of a stage touch, each sample coming once an epoch."""
    first = first_step * global_batch_size // num_samples
    last = (end_step * global_batch_size - 1) // num_samples
    last = min(last, first + num_views - 1)
    return tuple(sorted({epoch % num_views for epoch in range(first, last + 1)}))
