"""Samples to microbatches: DataLoader workers that each build one whole uint8 microbatch.

What is asked of a worker is a range of the stream (training) or of the split (evaluation); it
answers with a ``Batch``. Nothing here knows of ranks: the caller asks for its own microbatches.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from rtl_dist.data.augment import augmentation_keys
from rtl_dist.data.dataset import SampleReader, Split
from rtl_dist.data.decode import decode
from rtl_dist.data.order import mix64, samples_at
from rtl_dist.errors import DataError, RtlDistError

Transform = Callable[[torch.Tensor, int], torch.Tensor]

_MAX_SUBSTITUTIONS = 16  # a split in which this many draws in a row are damaged is not one
_PREFETCH = 4  # microbatches each worker keeps ready


class Batch(NamedTuple):
    """One microbatch, on the host.

    inputs: uint8 (n, C, S, S) images, or float32 (n, F) cached features.
    labels: int64 (n,) class numbers, or float32 (n, num_classes) of 0 and 1.
    samples: int64 (n,) sample numbers within the split, of what is really in ``inputs``.
    bad: what each damaged sample that was replaced (or, in evaluation, left black) suffers from.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    bad: list[str]


class TrainingMicrobatches(TorchDataset[Batch]):
    """``dataset[p]`` is the microbatch at positions ``[p, p + size)`` of the training stream."""

    def __init__(
        self,
        split: Split,
        transform: Transform,
        *,
        size: int,
        channels: int,
        seed: int,
        views: int | None,
    ) -> None:
        self._images = _Images(split, transform, channels)
        self._split, self._size, self._seed, self._views = split, size, seed, views

    def __getitem__(self, position: int) -> Batch:
        num_samples = self._split.num_samples
        samples, epochs = samples_at(position, self._size, num_samples=num_samples, seed=self._seed)
        keys = augmentation_keys(samples, epochs, seed=self._seed, views=self._views)
        return self._images.batch(samples, keys, substitute=True)


class SplitMicrobatches(TorchDataset[Batch]):
    """``dataset[i]`` holds samples ``[i, i + size)`` of a split in its own order.

    With ``seed`` and ``view``, the samples are augmented as training would in that view; the last
    block is then filled up from the start of the split, so that every block is full.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        *,
        size: int,
        channels: int,
        seed: int = 0,
        view: int | None = None,
    ) -> None:
        self._images = _Images(split, transform, channels)
        self._split, self._size, self._seed, self._view = split, size, seed, view

    def __getitem__(self, first: int) -> Batch:
        num_samples = self._split.num_samples
        if self._view is None:
            samples = np.arange(first, min(first + self._size, num_samples), dtype=np.int64)
            return self._images.batch(samples, np.zeros_like(samples), substitute=False)
        samples = np.arange(first, first + self._size, dtype=np.int64) % num_samples
        epochs = np.full_like(samples, self._view)
        keys = augmentation_keys(samples, epochs, seed=self._seed, views=None)
        return self._images.batch(samples, keys, substitute=True)


class _Images:
    """Reads, decodes and transforms; opens its files in whichever process first uses it."""

    def __init__(self, split: Split, transform: Transform, channels: int) -> None:
        self._split, self._transform, self._channels = split, transform, channels
        self._reader: SampleReader | None = None

    def batch(self, samples: np.ndarray, keys: np.ndarray, *, substitute: bool) -> Batch:
        used, bad, views = samples.copy(), [], []
        for i, (sample, key) in enumerate(zip(samples.tolist(), keys.tolist(), strict=True)):
            try:
                views.append(self._view(sample, key))
            except DataError as error:
                bad.append(self._name_fault(sample, error))
                if substitute:
                    used[i], view = self._substitute(sample, key, bad)
                    views.append(view)
                else:
                    views.append(None)
        like = next((view for view in views if view is not None), torch.empty(0))
        images = torch.stack([torch.zeros_like(like) if view is None else view for view in views])
        labels = torch.from_numpy(self._split.labels(used))
        return Batch(images, labels, torch.from_numpy(used), bad)

    def _view(self, sample: int, key: int) -> torch.Tensor:
        if self._reader is None:
            self._reader = SampleReader(self._split)
        return self._transform(decode(self._reader.read(sample), self._channels), key)

    def _substitute(self, sample: int, key: int, bad: list[str]) -> tuple[int, torch.Tensor]:
        """Another sample, chosen by the damaged one's number alone, so the same at any W."""
        draw = np.array([sample], dtype=np.uint64)
        for _ in range(_MAX_SUBSTITUTIONS):
            draw = mix64(draw + np.uint64(0x9E3779B97F4A7C15))
            other = int(draw[0] % np.uint64(self._split.num_samples))
            try:
                return other, self._view(other, key)
            except DataError as error:
                bad.append(self._name_fault(other, error))
        raise DataError(
            f"{_MAX_SUBSTITUTIONS} samples in a row cannot be read, the last: {bad[-1]}; run"
            " `rtl-dist pack` again"
        )

    def _name_fault(self, sample: int, error: DataError) -> str:
        text = str(error)
        if text.startswith("sample "):
            return text
        return f"{self._split.describe(sample)} {text}"


def microbatch_positions(
    first_step: int,
    end_step: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[int]:
    """The stream positions of the microbatches of one rank, in the order it trains on them.

    Of a step's K microbatches, rank r takes the r-th of W equal runs.
    """
    per_rank = global_batch_size // micro_batch_size // world_size
    for step in range(first_step, end_step):
        for microbatch in range(rank * per_rank, (rank + 1) * per_rank):
            yield step * global_batch_size + microbatch * micro_batch_size


def make_loader(
    microbatches: TorchDataset[Batch],
    requests: Iterable[int],
    *,
    workers: int,
    pin_memory: bool,
) -> Iterable[Batch]:
    """A loader that answers ``requests`` in order, ``workers`` microbatches at a time."""
    return Batches(
        DataLoader(
            microbatches,
            batch_size=None,
            sampler=_Requests(requests),
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=_PREFETCH if workers else None,
            worker_init_fn=start_worker if workers else None,
        )
    )


class Batches(Iterable[Batch]):
    """A DataLoader whose workers end at their first error, raised here as it was there."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        if not self._loader.num_workers:
            return iter(self._loader)
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)
        return _from_workers(iter(self._loader))


def resolve_workers(workers: Literal["auto"] | int, *, local_world_size: int) -> int:
    """auto: the CPUs this process may use (affinity, not ``os.cpu_count``, which ignores SLURM and
    cgroups) shared by the ranks of this machine."""
    if workers != "auto":
        return workers
    return max(1, min(16, available_cpus() // local_world_size))


def available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _from_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    # DataLoader raises a worker's error from frames that refer to each other and to the iterator.
    # Left to the garbage collector, that would fail to tell the workers to end (torch 2.15), so
    # the frames are let go here and the iterator with them.
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RtlDistError as error:
            del batches
            kind = type(error)
            text = str(error.with_traceback(None)).strip()  # a traceback that ends in the message
            text = text.splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
            raise kind(text) from None
        except Exception as error:  # noqa: BLE001 - raised again, of whatever kind
            del batches
            raise error.with_traceback(None) from None
        yield batch


def _kill_workers() -> None:
    # A worker that was not told to end ignores SIGTERM too, and multiprocessing, which sends it at
    # exit, would wait for it for ever. Runs before that, since it is registered later.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch complains of workers that died
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class _Requests(torch.utils.data.Sampler[int]):
    def __init__(self, requests: Iterable[int]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[int]:
        return iter(self._requests)


def start_worker(worker: int) -> None:
    """A ``worker_init_fn``. A stop request is for the training process: it saves, then ends its
    workers itself."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
