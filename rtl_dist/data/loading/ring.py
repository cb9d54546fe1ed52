"""Microbatches travel from workers to the training process through a ring of shared slots.

A worker writes labels and pixels straight into the slot that its request names; what goes through
the queue is a few numbers. So the training process neither copies nor unpickles an image, and both
go to a GPU in one copy, from memory that it may be pinned for. The slots are anonymous shared
memory, not files in ``/dev/shm``, which containers often keep at 64 MB.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from rtl_dist.data.images.tiny import TinyBatch, enlarge
from rtl_dist.data.loading.batch import Batch, Microbatches
from rtl_dist.data.loading.transfer import aligned, label_room, packed_batch


class Request(NamedTuple):
    """What a worker is asked for."""

    slot: int
    """Where in the ring it is to be put."""
    position: int
    """Which microbatch."""


class Reply(NamedTuple):
    """A batch of n samples without its pixels and labels, which are in the ring."""

    slot: int
    """Where."""
    shape: tuple[int, ...]
    """(n, C, H, W) of the pixels."""
    tiny_shapes: np.ndarray | None
    """``shapes`` of the ``TinyBatch`` that the pixels are; None: they are what the network sees."""
    label_shape: tuple[int, ...]
    """(n,) of int64 class numbers, or (n, num_classes) of float32 0 and 1."""
    samples: np.ndarray
    """int64 (n,): numbers within the split of what is really in the slot."""
    bad: list[str]
    """What each damaged sample suffers from; see ``Batch``."""


class Ring(Dataset[Reply]):
    """Answers requests by filling slots; a ``DataLoader``'s data set.

    Args:
        num_slots: one more than there are requests under way, for the batch in use.
        enlarge_here: tiny images are enlarged where the batch is used, not by the workers.

    Attributes:
        slots: uint8 (num_slots, bytes), in memory that workers share; each has room for labels,
            and for pixels behind it.
    """

    def __init__(
        self, microbatches: Microbatches, num_slots: int, *, enlarge_here: bool = False
    ) -> None:
        self._microbatches, self._enlarge_here = microbatches, enlarge_here
        self._is_pinned = False
        self._label_room = _label_room(microbatches)
        self.slots = _shared_uint8((num_slots, slot_bytes(microbatches)))

    def __getitem__(self, request: Request) -> Reply:
        room, tiny = self.slots[request.slot], None
        pixels = room[self._label_room :][: math.prod(self._microbatches.shape)]
        slot = pixels.view(self._microbatches.shape)
        if self._enlarge_here:
            tiny = self._microbatches.fill_tiny(request.position, slot)
            self._enlarge_here = tiny is not None  # where one image is not tiny, more are not
        if tiny is not None:
            batch, crops = tiny
            shape, tiny_shapes = tuple(crops.pixels.shape), crops.shapes
        else:
            batch, tiny_shapes = self._microbatches.fill(request.position, slot), None
            shape = tuple(batch.inputs.shape)
        labels = batch.labels.contiguous().view(-1).view(torch.uint8)
        room[: len(labels)] = labels
        return Reply(
            request.slot,
            shape,
            tiny_shapes,
            tuple(batch.labels.shape),
            batch.samples.numpy(),
            batch.bad,
        )

    def batch(self, reply: Reply, device: torch.device) -> Batch:
        """The batch of a reply on ``device``, in the process that asked; on a CPU its inputs are
        in the slot itself."""
        filled = self.slots[reply.slot, : self._label_room + math.prod(reply.shape)]
        content, labels = packed_batch(filled, self._label_room, reply.label_shape, device)
        pixels = content.view(reply.shape)
        if reply.tiny_shapes is not None:
            pixels = enlarge(TinyBatch(pixels, reply.tiny_shapes), self._microbatches.shape[-1])
        return Batch(pixels, labels, torch.from_numpy(reply.samples), reply.bad)

    def pin(self) -> None:
        """Locks the slots in memory, so that a GPU copies from them while the CPU goes on. Where
        that is refused (a limit of the system's) copies are slower and all else is the same."""
        address, size = self.slots.data_ptr(), self.slots.numel()
        self._is_pinned = not int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if not self._is_pinned:
            with suppress(RuntimeError):  # CUDA tells of the refusal again, once, at the next call
                torch.zeros(1, device="cuda").item()

    def unpin(self) -> None:
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.slots.data_ptr())
            self._is_pinned = False


class Requests(Sampler[Request]):
    """Gives each position the next slot in turn."""

    def __init__(self, positions: Iterable[int], num_slots: int) -> None:
        self._positions, self._num_slots = positions, num_slots

    def __iter__(self) -> Iterator[Request]:
        for number, position in zip(count(), self._positions):
            yield Request(number % self._num_slots, position)


def slot_bytes(microbatches: Microbatches) -> int:
    """How large a slot is that holds any of these."""
    return _label_room(microbatches) + aligned(math.prod(microbatches.shape))


def _label_room(microbatches: Microbatches) -> int:
    return label_room(microbatches.shape[0], microbatches.label_bytes)


def as_it_is(reply: Any) -> Any:
    """A ``collate_fn``: the default one would send every array through a file of its own."""
    return reply


def _shared_uint8(shape: tuple[int, ...]) -> torch.Tensor:
    if sys.platform == "linux":  # where workers are forked and so share what is mapped
        memory = mmap.mmap(-1, max(1, math.prod(shape)))
        return torch.frombuffer(memory, dtype=torch.uint8)[: math.prod(shape)].view(shape)
    return torch.empty(shape, dtype=torch.uint8).share_memory_()
