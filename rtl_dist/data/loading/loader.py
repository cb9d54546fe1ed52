"""Microbatches made by worker processes, whole ones each, and brought to the device in order."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sized

import torch
from torch.utils.data import DataLoader

from rtl_dist.core.text import readable_size
from rtl_dist.data.loading.batch import Batch, Microbatches, to_device
from rtl_dist.data.loading.ring import Reply, Requests, Ring, as_it_is, slot_bytes
from rtl_dist.data.loading.transfer import copied_to_gpu, on_device
from rtl_dist.data.loading.workers import WorkerBatches, start_worker

LOG = logging.getLogger("rtl_dist")
_ASK_EVERY_S = 1.0
_PREFETCH, _FEWER_PREFETCH = 4, 2  # microbatches that each worker keeps ready, at most
_LEAST_A_WORKER = 2  # microbatches: for fewer no process is started
RING_BYTES = 2**30  # where more would be needed for all that is ready, less is kept so


def make_loader(
    microbatches: Microbatches,
    positions: Iterable[int],
    *,
    workers: int,
    device: torch.device,
    ring_bytes: int = RING_BYTES,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterable[Batch]:
    """The microbatches at ``positions``, in order, on ``device``.

    A batch's inputs are lent until the next is asked for.

    Args:
        workers: processes that make them, at most; 0: this one does.
        ring_bytes: of memory that what is ready or in the making may take. Where it does not hold
            two microbatches a worker, fewer are kept ready, and then there are fewer workers; two
            microbatches is the least.
        give_up: asked once a second while a batch is waited for: if so, StopRequested is raised.
    """
    if isinstance(positions, Sized):  # to start a process costs about as much as a microbatch
        workers = min(workers, math.ceil(len(positions) / _LEAST_A_WORKER))
    if not workers:
        return _from_this_process(microbatches, positions, device)
    workers, prefetch = _fitting(workers, slot_bytes(microbatches), ring_bytes)
    num_slots = workers * prefetch + 1  # one for the batch in use
    ring = Ring(microbatches, num_slots, enlarge_here=device.type == "cuda")
    loader: DataLoader[Reply] = DataLoader(
        ring,
        batch_size=None,
        sampler=Requests(positions, num_slots),
        num_workers=workers,
        prefetch_factor=prefetch,
        timeout=_ASK_EVERY_S,
        collate_fn=as_it_is,
        worker_init_fn=start_worker,
        # forked workers share the ring's memory and start in milliseconds
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    return _Lent(ring, WorkerBatches(loader, give_up), device)


def _fitting(workers: int, microbatch_bytes: int, ring_bytes: int) -> tuple[int, int]:
    """How many workers there are, and how many microbatches each keeps ready."""
    most = max(1, ring_bytes // microbatch_bytes - 1)
    if most < workers:
        LOG.info(
            "%d of %d loader processes: a microbatch takes %s, and %s of memory are for them",
            most,
            workers,
            readable_size(microbatch_bytes),
            readable_size(ring_bytes),
        )
        workers = most
    comfortable = workers * _PREFETCH * microbatch_bytes <= min(ring_bytes, RING_BYTES)
    prefetch = _PREFETCH if comfortable else _FEWER_PREFETCH
    return workers, min(prefetch, most // workers)


def _from_this_process(
    microbatches: Microbatches, positions: Iterable[int], device: torch.device
) -> Iterator[Batch]:
    for position in positions:
        out = torch.empty(microbatches.shape, dtype=torch.uint8)
        yield to_device(microbatches.fill(position, out), device)


class _Lent(Iterable[Batch]):
    """What the workers put into the ring, on ``device``; a slot is given back at the next batch."""

    def __init__(self, ring: Ring, replies: Iterable[Reply], device: torch.device) -> None:
        self._ring, self._replies, self._device = ring, replies, device

    def __iter__(self) -> Iterator[Batch]:
        if self._device.type != "cuda":
            for reply in self._replies:
                yield on_device(reply, self._ring.batch, self._device)
            return
        replies = iter(self._replies)  # the workers start before the memory is pinned
        self._ring.pin()
        try:
            yield from copied_to_gpu(replies, self._ring.batch, self._device)
        finally:
            self._ring.unpin()
