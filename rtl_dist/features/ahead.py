"""Microbatches of cached features, gathered by a thread while the one before is trained on.

Rows lie anywhere in files of many GB; a network takes a microbatch of activations in fewer
milliseconds than copying it takes, which the thread that asks the GPU for its work has no time for.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from rtl_dist.data.loading.batch import Batch
from rtl_dist.data.loading.transfer import copied_to_gpu, label_room, packed_batch
from rtl_dist.features.microbatches import ViewMicrobatches

_BUFFERS = 2  # one in use, one being filled


def batches_ahead(
    cached: ViewMicrobatches, positions: Iterable[int], *, device: torch.device
) -> Iterator[Batch]:
    """The microbatches at these positions of the stream, on ``device``, each lent until the next
    is asked for. The thread ends with the iterator."""
    room = label_room(cached.size, cached.split.label_bytes)
    num_bytes = room + cached.size * cached.row_bytes
    buffers = [
        torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for _ in range(_BUFFERS)
    ]

    def to_batch(filled: _Filled, where: torch.device) -> Batch:
        inputs, labels = packed_batch(filled.buffer, room, filled.label_shape, where)
        features = cached.as_features(inputs.view(cached.size, -1))
        return Batch(features, labels, torch.from_numpy(filled.used), [])

    with closing(_filled_ahead(cached, positions, buffers, room)) as filled:
        if device.type == "cuda":
            yield from copied_to_gpu(filled, to_batch, device)
        else:
            for one in filled:
                yield to_batch(one, device)


class _Filled(NamedTuple):
    """A buffer with a microbatch in it."""

    buffer: torch.Tensor
    """uint8: labels, and features behind them."""
    label_shape: tuple[int, ...]
    """Of the labels."""
    used: np.ndarray
    """int64 (n,): the samples."""


def _filled_ahead(
    cached: ViewMicrobatches,
    positions: Iterable[int],
    buffers: list[torch.Tensor],
    room: int,
) -> Generator[_Filled]:
    """Each is filled anew when the one after it is asked for."""
    free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
    ready: SimpleQueue[_Filled | BaseException | None] = SimpleQueue()
    for buffer in buffers:
        free.put(buffer)

    def fill_all() -> None:
        try:
            for position in positions:
                buffer = free.get()
                if buffer is None:
                    return
                ready.put(_fill(cached, position, buffer, room))
            ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the microbatch is asked for
            ready.put(error)

    thread = threading.Thread(target=fill_all, name="cached features", daemon=True)
    thread.start()
    try:
        while (filled := ready.get()) is not None:
            if isinstance(filled, BaseException):
                raise filled
            yield filled
            free.put(filled.buffer)
    finally:
        free.put(None)
        thread.join()


def _fill(cached: ViewMicrobatches, position: int, buffer: torch.Tensor, room: int) -> _Filled:
    rows = buffer[room:].view(cached.size, -1).numpy()
    labels, used = cached.gather(position, rows)
    of_labels = torch.from_numpy(np.ascontiguousarray(labels)).view(-1).view(torch.uint8)
    buffer[: len(of_labels)] = of_labels
    return _Filled(buffer, labels.shape, used)
