"""Computes one view, its blocks shared among the ranks, for the store or for rank 0 alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rtl_dist.core.device_memory import Attempt, InParts
from rtl_dist.core.errors import DataError, OutOfMemory, RtlDistError, StopRequested
from rtl_dist.data.loading.batch import Batch
from rtl_dist.data.loading.blocks import blocks_of_rank, cannot_evaluate, num_rounds
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.terminal import Progress
from rtl_dist.features.seal import Seal
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view import View
from rtl_dist.features.view_files import BlockSums
from rtl_dist.features.views import ViewPlan
from rtl_dist.features.writing import BlockWriter


class NoCachedFeaturesError(RtlDistError):
    """Features will not be had from the store, and why; known to all ranks."""


def rounds_of_view(plan: ViewPlan, runtime: Runtime) -> int:
    """How often ``compute_view`` moves its bar on: a block of each rank at a time."""
    shape = plan.shape
    return num_rounds(shape.num_samples, shape.block_size, world_size=runtime.world_size)


def compute_view(
    plan: ViewPlan,
    store: FeatureStore,
    *,
    keep: set[str],
    runtime: Runtime,
    workers: int,
    bar: Progress,
) -> None:
    """Computes a view and publishes it. Called by all ranks.

    Args:
        keep: keys of views that are not given up for it.

    Raises:
        NoCachedFeaturesError: on every rank, if the disk does not allow it.
        StopRequested: on every rank, if one was asked to stop.
        OutOfMemory: on every rank, if the memory of one does not hold a microbatch.
        RtlDistError: on every rank, if the loader of one failed, or an evaluation's sample is
            damaged.
    """
    with runtime.heartbeat.phase("reserving features", open_ended=runtime.is_main):
        folder = Path(runtime.from_main(lambda: _reserve(plan, store, keep)))
    try:
        written = _write_blocks(plan, folder, store.seal, runtime=runtime, workers=workers, bar=bar)
        if written.bad and not plan.substitutes:
            raise DataError(cannot_evaluate(written.bad))
        with runtime.heartbeat.phase("writing features", open_ended=runtime.is_main):
            runtime.from_main(lambda: _publish(plan, store, folder, written))
    finally:
        if runtime.is_main:
            store.discard(folder)  # nothing of it is left under this name if all went well


def compute_in_memory(plan: ViewPlan, *, runtime: Runtime, workers: int, bar: Progress) -> View:
    """Computes a view for rank 0, without the store; called by all ranks.

    Returns:
        On other ranks than 0 one without rows, but with all that is damaged.

    Raises:
        StopRequested: on every rank, if one was asked to stop.
        RtlDistError: on every rank, if the loader of one failed.
    """
    shape = plan.shape
    mine = blocks_of_rank(
        shape.num_samples, shape.block_size, rank=runtime.rank, world_size=runtime.world_size
    )
    computed = _computed(plan, mine, runtime=runtime, workers=workers)
    rounds = rounds_of_view(plan, runtime)
    blocks: list[tuple[int, torch.Tensor, list[int]]] = []
    bad: list[str] = []
    for block in runtime.in_rounds(computed, rounds, what="computing features"):
        if block is not None:
            bad += block.bad
            blocks.append((block.first, block.rows, block.used))
        bar.update()
    gathered = runtime.gather_to_main(blocks)
    every = sorted((b for of_rank in gathered or [] for b in of_rank), key=lambda block: block[0])
    nothing = torch.empty((0, *shape.row), dtype=shape.dtype)
    return View(
        features=torch.cat([nothing, *(rows for _, rows, _ in every)]),
        used=torch.tensor([sample for *_, used in every for sample in used], dtype=torch.int64),
        bad=[name for names in runtime.gather(bad) for name in names],
    )


class _Computed(NamedTuple):
    """A block that was computed."""

    first: int
    """Number of its first row."""
    rows: torch.Tensor
    """What the frozen part makes of its images, on the host; what filled it up is left out."""
    used: list[int]
    """The samples that its rows really are of."""
    bad: list[str]
    """What each damaged sample met in it suffers from."""


class _Written(NamedTuple):
    """What all ranks have written of a view; see ``complete_view``."""

    checksums: list[BlockSums]
    used: np.ndarray
    bad: list[str]


def _reserve(plan: ViewPlan, store: FeatureStore, keep: set[str]) -> str:
    if store.has(plan.key):
        store.forget(plan.key)  # a damaged sample was met in it, which may be whole now
    try:
        return str(store.reserve(plan.key, plan.shape, keep=keep))
    except OSError as error:
        raise NoCachedFeaturesError(f"{store.root}: {error.strerror}") from error


def _publish(plan: ViewPlan, store: FeatureStore, folder: Path, written: _Written) -> None:
    try:
        store.publish(
            folder,
            plan.key,
            plan.shape,
            checksums=written.checksums,
            used=written.used,
            bad=written.bad,
            content=plan.content,
        )
    except OSError as error:
        raise NoCachedFeaturesError(f"{store.root}: {error.strerror or error}") from error


def _write_blocks(
    plan: ViewPlan, folder: Path, seal: Seal, *, runtime: Runtime, workers: int, bar: Progress
) -> _Written:
    """Computes and writes this rank's blocks, in step with the other ranks."""
    shape = plan.shape
    mine = blocks_of_rank(
        shape.num_samples, shape.block_size, rank=runtime.rank, world_size=runtime.world_size
    )
    computed = _computed(plan, mine, runtime=runtime, workers=workers)
    bad: list[str] = []
    with BlockWriter(folder, seal) as writer:
        for turn in range(rounds_of_view(plan, runtime)):
            failure = None
            try:
                block = next(computed) if turn < len(mine) else None
            except RtlDistError as error:
                block, failure = None, error
            if block is not None:
                bad += block.bad
                writer.write(block.first, block.rows, block.used)
            bar.update()
            _agree(runtime, folder, failure, disk_failed=writer.has_failed)
        blocks = writer.written()
    _agree(runtime, folder, None, disk_failed=writer.has_failed)
    every = sorted(block for of_rank in runtime.gather(blocks) for block in of_rank)
    return _Written(
        checksums=[block.sums for block in every],
        used=np.array([sample for block in every for sample in block.used], dtype=np.int64),
        bad=[name for names in runtime.gather(bad) for name in names],
    )


def _agree(
    runtime: Runtime, folder: Path, failure: RtlDistError | None, *, disk_failed: bool
) -> None:
    """Ends all ranks alike where one failed or was asked to stop."""
    runtime.heartbeat.beat()
    stop, num_failed = runtime.agree(bad_samples=int(disk_failed), failure=failure)
    if stop:
        raise StopRequested(
            "stopped while features were computed; whole views are kept: start again to go on"
        )
    if num_failed:
        raise NoCachedFeaturesError(f"{folder.parent} cannot be written by every process")


def _computed(
    plan: ViewPlan, blocks: range, *, runtime: Runtime, workers: int
) -> Iterator[_Computed]:
    """
    Raises:
        OutOfMemory: the memory does not hold a block of a training view, which is as large as a
            microbatch. RtlDistError: it does not hold one image of an evaluation's; the loader
            failed.
    """
    in_parts = InParts("computing features")

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        with runtime.accelerator.autocast():
            return plan.frozen(images.to(runtime.device)).cpu()

    batches = images_of_blocks(plan, blocks, runtime=runtime, workers=workers)
    for first, batch in zip(blocks, batches, strict=True):
        if plan.number is None:
            rows = in_parts(features, batch.inputs)
        else:
            with Attempt() as attempt:
                rows = features(batch.inputs)
            if attempt.ran_out:
                raise OutOfMemory(f"out of memory with microbatches of {plan.shape.block_size}")
        rows = rows[: min(plan.shape.block_size, plan.shape.num_samples - first)]
        yield _Computed(first, rows, batch.samples[: len(rows)].tolist(), batch.bad)


def images_of_blocks(
    plan: ViewPlan, blocks: range, *, runtime: Runtime, workers: int
) -> Iterator[Batch]:
    """The images of a rank's blocks, on its device."""
    loader = make_loader(
        plan.microbatches(),
        blocks,
        workers=workers,
        device=runtime.device,
        ring_bytes=runtime.loader_bytes,
        give_up=runtime.is_asked,
    )
    return runtime.heartbeat.while_fetching(loader, are_remote=plan.split.is_remote)
