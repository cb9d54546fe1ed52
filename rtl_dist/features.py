"""Features of a frozen trunk, computed once a view and kept in memory for the head to train on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rtl_dist.config import Config, Stage
from rtl_dist.data.augment import TrainTransform
from rtl_dist.data.loader import make_loader
from rtl_dist.data.microbatches import SplitMicrobatches
from rtl_dist.data.order import Order
from rtl_dist.data.ring import Batch
from rtl_dist.data.split import Split
from rtl_dist.errors import RtlDistError, StopRequested
from rtl_dist.model.classifier import Classifier
from rtl_dist.runtime import Runtime

LOG = logging.getLogger("rtl_dist")
_LIMIT_BYTES = 2 * 2**30  # of memory a process; beyond it a stage trains uncached


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """features: (views, num_samples, F) on the host. used: int64 (views, num_samples), the sample
    each row really holds (another one where a damaged sample was replaced). bad: their names."""

    views: tuple[int, ...]
    features: torch.Tensor
    used: torch.Tensor
    bad: list[str]

    def batches(
        self, positions: Iterator[int], *, size: int, split: Split, order: Order, num_views: int
    ) -> Iterator[Batch]:
        """The batches that ``TrainingMicrobatches`` would yield, as features."""
        row_of = {view: row for row, view in enumerate(self.views)}
        for position in positions:
            samples, epochs = order.samples_at(position, size)
            rows = torch.tensor([row_of[int(e) % num_views] for e in epochs])
            used = self.used[rows, torch.from_numpy(samples)]
            labels = torch.from_numpy(split.labels(used.numpy()))
            yield Batch(self.features[rows, torch.from_numpy(samples)], labels, used, [])


def views_of_stage(
    stage: Stage, *, first_step: int, end_step: int, global_batch_size: int, num_samples: int
) -> tuple[int, ...]:
    """Which views of its cycle the steps of a stage touch."""
    assert stage.views is not None
    first = first_step * global_batch_size // num_samples
    last = (end_step * global_batch_size - 1) // num_samples
    return tuple(sorted({epoch % stage.views for epoch in range(first, last + 1)}))


def can_cache(config: Config, stage: Stage, split: Split, *, num_features: int) -> bool:
    """Whether a stage can train on cached features: nothing below the head may change from one
    visit of a view to the next, and all of it must fit."""
    wanted = stage.cache == "auto" and stage.views is not None
    head_only = stage.trainable in ("head", ["head"])
    mixes_pixels = config.augment.mixup > 0 or config.augment.cutmix > 0
    if not (wanted and head_only) or mixes_pixels or config.data.backend != "indexed":
        return False
    assert stage.views is not None
    size = stage.views * split.num_samples * num_features * 4
    if size > _LIMIT_BYTES:
        LOG.info("features would take %.1f GiB; training the head uncached", size / 2**30)
        return False
    return True


@torch.inference_mode()
def compute_features(
    model: Classifier,
    split: Split,
    views: tuple[int, ...],
    *,
    config: Config,
    micro_batch_size: int,
    workers: int,
    runtime: Runtime,
) -> FeatureCache:
    """One pass over the split for each view, blocks shared among the ranks.

    Blocks have the size of a training microbatch, always full, so that the trunk computes what it
    would compute in training.

    Raises:
        StopRequested: on every rank, if one was asked to stop.
        RtlDistError: on every rank, if the loader of one failed.
    """
    shape = (len(views), split.num_samples)
    features = torch.zeros(*shape, model.head.in_features, dtype=runtime.dtype)
    used = torch.zeros(shape, dtype=torch.int64)
    bad: list[str] = []
    blocks = range(0, split.num_samples, micro_batch_size)
    mine = blocks[runtime.rank :: runtime.world_size]
    rounds = math.ceil(len(blocks) / runtime.world_size)
    transform = TrainTransform(
        config.augment, image_size=config.data.image_size, channels=config.data.channels
    )
    with runtime.progress(total=rounds * len(views), what="features", unit="batch") as bar:
        for row, view in enumerate(views):
            loader = make_loader(
                SplitMicrobatches(
                    split,
                    transform,
                    size=micro_batch_size,
                    seed=config.seed,
                    view=view,
                ),
                mine,
                workers=min(workers, len(mine)),
                device=runtime.device,
            )
            batches, failure = iter(loader), None
            for turn in range(rounds):
                try:
                    batch = next(batches) if turn < len(mine) else None
                except RtlDistError as error:
                    batch, failure = None, error
                if batch is not None:
                    with runtime.accelerator.autocast():
                        out = model.features(batch.inputs)
                    rows = torch.arange(mine[turn], mine[turn] + micro_batch_size)
                    rows = rows[: split.num_samples - mine[turn]]
                    features[row, rows] = out[: len(rows)].to("cpu", runtime.dtype)
                    used[row, rows] = batch.samples[: len(rows)]
                    bad += batch.bad
                bar.update()
                if runtime.agree(bad_samples=0, failure=failure)[0]:
                    raise StopRequested(
                        "stopped while features were computed; start again to go on"
                    )
    runtime.sum_over_ranks(features)  # each row is zero on all ranks but one, so the sum is exact
    runtime.sum_over_ranks(used)
    bad = [name for names in runtime.gather(bad) for name in names]
    return FeatureCache(views=views, features=features, used=used, bad=bad)
