"""Batches on their way to the device: labels and inputs side by side, in one copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from rtl_dist.core.device_memory import Attempt
from rtl_dist.data.loading.batch import Batch

T = TypeVar("T")
_ALIGNED = 64  # bytes, of which labels and inputs begin at a multiple: no value lies across


def aligned(num_bytes: int) -> int:
    """The room for so many bytes behind which values of any type may begin."""
    return math.ceil(num_bytes / _ALIGNED) * _ALIGNED


def label_room(count: int, label_bytes: int) -> int:
    """Bytes before the inputs of so many samples, for their labels."""
    return aligned(count * label_bytes)


def packed_batch(
    content: torch.Tensor, room: int, label_shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, as uint8 (bytes,), and labels on ``device``; a copy from pinned memory is only begun
    when this returns. On a CPU the inputs are where they were, and the labels are copied.

    Args:
        content: uint8 (bytes,), on the host: labels in the first ``room`` bytes, then inputs.
        label_shape: (n,) of int64 class numbers, or (n, num_classes) of float32 0 and 1.
    """
    there = content.to(device, non_blocking=True)
    dtype = torch.int64 if len(label_shape) == 1 else torch.float32
    labels = there[: math.prod(label_shape) * dtype.itemsize].view(dtype).view(label_shape)
    if there.device == content.device:
        labels = labels.clone()  # the content is only lent
    return there[room:], labels


def on_device(item: T, to_batch: Callable[[T, torch.device], Batch], device: torch.device) -> Batch:
    """What ``to_batch`` makes of an item there, or on the host where the device's memory does not
    hold it."""
    with Attempt():
        return to_batch(item, device)
    return to_batch(item, torch.device("cpu"))


def copied_to_gpu(
    items: Iterable[T], to_batch: Callable[[T, torch.device], Batch], device: torch.device
) -> Iterator[Batch]:
    """What ``on_device`` makes of each item for a GPU, by a copy that runs beside the step before;
    an item is done with when the next batch is asked for."""
    # A stream of its own: the copy is done early, however far the GPU is behind.
    side = torch.cuda.Stream(device)
    try:
        for item in items:
            with torch.cuda.stream(side):
                batch = on_device(item, to_batch, device)
                copied = side.record_event()
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for tensor in (batch.inputs, batch.labels):
                if tensor.device.type == "cuda":
                    tensor.record_stream(current)
            yield batch
            copied.synchronize()
    finally:
        side.synchronize()
