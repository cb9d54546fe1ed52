"""One microbatch, what makes it, and its way to the device."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from rtl_dist.core.device_memory import Attempt
from rtl_dist.data.images.tiny import TinyBatch


class Batch(NamedTuple):
    """One microbatch of n samples."""

    inputs: torch.Tensor
    """uint8 (n, C, S, S) images, or cached features (n, ...) in a floating point type. They
    are only lent: the next batch may overwrite them. They are on the host where the
    device's memory did not hold them: whoever uses them brings them there, or parts of them."""
    labels: torch.Tensor
    """int64 (n,) class numbers, or float32 (n, num_classes) of 0 and 1."""
    samples: torch.Tensor
    """int64 (n,), on the host: numbers within the split of what is really in ``inputs``; -1 where
    samples have none, as in a stream."""
    bad: list[str]
    """What each damaged sample that was replaced (or, in evaluation, left black) suffers from."""


class Microbatches(Protocol):
    """What a worker is asked for."""

    shape: tuple[int, int, int, int]
    """(n, C, S, S), the most that one holds."""
    label_bytes: int
    """Of one sample's label."""

    def fill(self, position: int, out: torch.Tensor) -> Batch:
        """The microbatch at ``position``, its inputs being the first part of ``out``, uint8 of
        ``shape``."""

    def fill_tiny(self, position: int, out: torch.Tensor) -> tuple[Batch, TinyBatch] | None:
        """The same, but its inputs are crops that ``enlarge`` makes the microbatch of; None if they
        are not all tiny."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its inputs and labels on ``device``, or as it is where the memory there does
    not hold it; copies from pinned memory are only begun when this returns."""
    with Attempt():
        return batch._replace(
            inputs=batch.inputs.to(device, non_blocking=True),
            labels=batch.labels.to(device, non_blocking=True),
        )
    return batch
