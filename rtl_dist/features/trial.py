"""Whether a stage is done sooner on cached activations than on images, by a try of both.

Pooled features are fewer bytes than the image they are of, so to read them costs less than to have
the image from a loader. Activations from the middle of a network are several times as many: a disk,
or the copying, may then be slower than a GPU that computes them afresh.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rtl_dist.core.device_memory import Attempt
from rtl_dist.core.memory import available_memory
from rtl_dist.data.loading.blocks import blocks_of_rank
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.compute import images_of_blocks
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view import View, map_features
from rtl_dist.features.view_files import FILES, write_block
from rtl_dist.features.views import ViewPlan

HELD_BY_CACHE = 0.5  # of the memory, at most: the system's cache of files beside the processes
LEAST_BYTES = 2**28  # a view of fewer is read in a fraction of a second, whatever the rest
_LEAST_ROUNDS = 4  # microbatches of the loader; twice as many as workers, since all begin at once
_REPEATS = 3

TimeTraining = Callable[[torch.Tensor], float]
"""Seconds of a forward and a backward pass of the trained part, of a microbatch of features."""


@dataclass(frozen=True, kw_only=True)
class ImageTimes:
    """Seconds that an image takes one rank."""

    load_s: float
    """Until it comes from the loader."""
    frozen_s: float
    """In the frozen part."""
    train_s: float
    """In the trained part, forwards and backwards."""
    write_s: float
    """To write its features, in a thread."""
    read_s: float
    """To gather its features, in a thread."""

    def text(self) -> str:
        """In a line."""
        values = {
            "load": self.load_s,
            "compute": self.frozen_s,
            "train on": self.train_s,
            "write": self.write_s,
            "read": self.read_s,
        }
        return ", ".join(f"{value * 1e3:.2f} ms to {name}" for name, value in values.items())

    def afresh_s(self, images: int, *, overlap: bool) -> float:
        """Of a stage without the cache.

        Args:
            overlap: the device computes while the host reads; else both are one.
        """
        together = max if overlap else _sum
        return images * together(self.load_s, self.frozen_s + self.train_s)

    def cached_s(self, images: int, *, to_compute: int, overlap: bool) -> float:
        """With it, if the features of so many images are to be computed first."""
        together = max if overlap else _sum
        making = to_compute * together(self.load_s, self.frozen_s, self.write_s)
        return making + images * together(self.read_s, self.train_s)


def is_in_doubt(plan: ViewPlan) -> bool:
    """Whether reading a view may take longer than making its images and computing it."""
    shape, transform = plan.shape, plan.transform
    image_bytes = transform.channels * transform.image_size**2
    return shape.row_bytes > image_bytes and shape.num_bytes >= LEAST_BYTES


def measure(
    plans: list[ViewPlan],
    store: FeatureStore,
    *,
    time_training: TimeTraining,
    runtime: Runtime,
    workers: int,
) -> ImageTimes:
    """Times a few microbatches of a view; the slowest rank's of each. Called by all ranks.

    Args:
        plans: of all views that the stage will read: none of them is given up for the try, and
            where the host's memory does not hold them, reading is tried from the disk.

    Raises:
        StopRequested: on every rank. RtlDistError: on every rank, if the loader of one failed.
    """
    plan, shape = plans[0], plans[0].shape
    rounds = max(_LEAST_ROUNDS, 2 * workers)
    blocks = blocks_of_rank(
        shape.num_samples, shape.block_size, rank=runtime.rank, world_size=runtime.world_size
    )[:rounds]
    images, count, started_at = None, 0, time.perf_counter()
    batches = images_of_blocks(plan, blocks, runtime=runtime, workers=workers)
    for batch in runtime.in_rounds(batches, rounds, what="trying cached features"):
        if batch is not None:
            count += len(batch.inputs)
            images = batch.inputs.clone() if images is None else images
    load_s = (time.perf_counter() - started_at) / max(1, count)
    times = ImageTimes(load_s=load_s, frozen_s=0.0, train_s=0.0, write_s=0.0, read_s=0.0)
    if images is not None:
        times = _on_device(plans, store, images, times, time_training, runtime)
    of_ranks = [asdict(one) for one in runtime.gather(times)]
    return ImageTimes(**{name: max(one[name] for one in of_ranks) for name in of_ranks[0]})


def _on_device(
    plans: list[ViewPlan],
    store: FeatureStore,
    images: torch.Tensor,
    times: ImageTimes,
    time_training: TimeTraining,
    runtime: Runtime,
) -> ImageTimes:
    """With what is not the loader's."""
    features, count = None, len(images)

    @torch.no_grad()
    def compute() -> torch.Tensor:
        with runtime.accelerator.autocast():
            out: torch.Tensor = plans[0].frozen(images.to(runtime.device))
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        return out

    with Attempt():
        features = compute()
        times = replace(times, frozen_s=_best(compute) / count)
        times = replace(times, train_s=time_training(features) / count)
    if features is None:  # the memory does not hold a microbatch: then it will be halved
        return times
    write_s, read_s = _write_and_read(plans, store, features.cpu())
    return replace(times, write_s=write_s / count, read_s=read_s / count)


def _write_and_read(
    plans: list[ViewPlan], store: FeatureStore, rows: torch.Tensor
) -> tuple[float, float]:
    """Seconds of both; endless where the disk fails."""
    shape = replace(plans[0].shape, num_samples=len(rows))
    try:
        folder = store.reserve(plans[0].key, shape, keep={plan.key for plan in plans})
    except OSError:
        return float("inf"), float("inf")
    try:
        started_at = time.perf_counter()
        write_block(folder, 0, rows, store.seal)
        write_s = time.perf_counter() - started_at
        is_cold = sum(plan.shape.num_bytes for plan in plans) > available_memory() * HELD_BY_CACHE
        if is_cold:
            _drop_from_memory(folder / FILES[0])
        with open(folder / FILES[0], "rb") as file:
            mapping, features = map_features(file, shape)
        view = View(features=features, used=torch.arange(len(rows)), bad=[], mapping=mapping)
        if is_cold:
            view.will_be_read_at_random()
        out = np.zeros_like(view.rows)
        read_s = _best(partial(_read_all, view, out), repeats=1 if is_cold else _REPEATS)
    except OSError:
        return float("inf"), float("inf")
    finally:
        store.discard(folder)
    return write_s, read_s


def _read_all(view: View, out: np.ndarray) -> None:
    """In another order than they lie in."""
    order = np.random.default_rng(0).permutation(len(view.rows))
    view.ask_for(order)
    np.take(view.rows, order, axis=0, out=out, mode="clip")


def _drop_from_memory(path: Path) -> None:
    """So that a file is read from its disk, where the system can be asked for that."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _best(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Seconds of the fastest."""
    times = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        call()
        times.append(time.perf_counter() - started_at)
    return min(times)


def _sum(*values: float) -> float:
    return sum(values)
