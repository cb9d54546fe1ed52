"""One microbatch, what makes it, and its way to the device."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from rtl_dist.data.images.tiny import TinyBatch


class Batch(NamedTuple):
    """One microbatch.

    inputs: uint8 (n, C, S, S) images, or float32 (n, F) cached features. Images that workers made
        are only lent: the next batch may overwrite them.
    labels: int64 (n,) class numbers, or float32 (n, num_classes) of 0 and 1.
    samples: int64 (n,) sample numbers within the split, of what is really in ``inputs``; on the
        host.
    bad: what each damaged sample that was replaced (or, in evaluation, left black) suffers from.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    bad: list[str]


class Microbatches(Protocol):
    """What a worker is asked for. ``shape``: (n, C, S, S), the most that one holds."""

    shape: tuple[int, int, int, int]

    def fill(self, position: int, out: torch.Tensor) -> Batch:
        """The microbatch at ``position``, its inputs being the first part of ``out``, uint8 of
        ``shape``."""

    def fill_tiny(self, position: int, out: torch.Tensor) -> tuple[Batch, TinyBatch] | None:
        """The same, but its inputs are crops that ``enlarge`` makes the microbatch of; None if they
        are not all tiny."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    return batch._replace(
        inputs=batch.inputs.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
    )
