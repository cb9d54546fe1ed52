"""Where a stage's microbatches come from: pixels from workers, cached features, or a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from rtl_dist.config import Config, ResolvedStage
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import training_transform
from rtl_dist.data.loading.batch import Batch, to_device
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import TrainingMicrobatches, microbatch_positions
from rtl_dist.data.loading.stream import stream_microbatches
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.data.order.training import training_order
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.maker import FeatureMaker
from rtl_dist.features.store import View

LOG = logging.getLogger("rtl_dist")


@dataclass(kw_only=True)
class StageBatches:
    """This rank's microbatches of a stage, in order.

    are_features: what the frozen part made of the images, not images. bad: damaged samples met in
    opening it.
    """

    iterator: Iterator[Batch]
    are_features: bool = False
    bad: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Ends the workers."""
        self.iterator = iter(())


def open_stage_batches(
    stage: ResolvedStage,
    *,
    config: Config,
    split: Split,
    features: FeatureMaker | None,
    num_classes: int,
    runtime: Runtime,
    first_step: int,
    end_step: int,
    micro_batch_size: int,
    workers: int,
) -> StageBatches:
    """Opens the microbatches of steps ``[first_step, end_step)`` for this rank.

    Args:
        features: of the stage's frozen part, if it has one.

    Raises:
        StopRequested: while features were computed. RtlDistError: a rank's loader failed then.
    """
    if first_step >= end_step:
        return StageBatches(iterator=iter(()))
    global_batch_size = config.batch.global_
    positions = microbatch_positions(
        first_step,
        end_step,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    transform = training_transform(stage, channels=config.data.channels)
    if config.data.backend == "stream":
        stream = stream_microbatches(
            config.data,
            transform,
            size=micro_batch_size,
            seed=config.seed,
            first_step=first_step,
            rank=runtime.rank,
            num_classes=num_classes,
            workers=workers,
            device=runtime.device,
        )
        return StageBatches(iterator=iter(stream))
    order = training_order(split, config.data, seed=config.seed)
    if features is not None and stage.views is not None and stage.augment.mixes:
        LOG.info("no cached features of %s: mixup and cutmix mix the pixels", split.name)
    elif features is not None and stage.views is not None:
        numbers = tuple(range(stage.views))
        if config.data.sampling == "natural":
            numbers = views_of_stage(
                stage.views,
                first_step=first_step,
                end_step=end_step,
                global_batch_size=global_batch_size,
                num_samples=split.num_samples,
            )
        to_come = (end_step - first_step) * global_batch_size
        views = features.training_views(split, numbers, samples_to_come=to_come)
        if views is not None:
            cached = _ViewBatches(
                views=views,
                order=order,
                split=split,
                num_views=stage.views,
                size=micro_batch_size,
            )
            return StageBatches(
                iterator=(to_device(batch, runtime.device) for batch in cached.at(positions)),
                are_features=True,
                bad=[name for view in views.values() for name in view.bad],
            )
    microbatches = TrainingMicrobatches(
        split, transform, order=order, size=micro_batch_size, views=stage.views
    )
    loader = make_loader(
        microbatches,
        positions,
        workers=workers,
        device=runtime.device,
        give_up=runtime.is_asked,
    )
    return StageBatches(iterator=iter(loader))


@dataclass(frozen=True, kw_only=True)
class _ViewBatches:
    """The microbatches that ``TrainingMicrobatches`` would yield, as features; see ``Batch``."""

    views: dict[int, View]
    order: TrainingStream
    split: Split
    num_views: int
    size: int

    def at(self, positions: Iterator[int]) -> Iterator[Batch]:
        for position in positions:
            samples, epochs = self.order.samples_at(position, self.size)
            numbers = epochs % self.num_views
            inputs: torch.Tensor | None = None
            used = np.empty_like(samples)
            for number in np.unique(numbers):
                view, chosen = self.views[int(number)], numbers == number
                rows = torch.from_numpy(samples[chosen])
                features = view.features[rows]
                if inputs is None:
                    inputs = features.new_empty((self.size, *features.shape[1:]))
                inputs[torch.from_numpy(chosen)] = features
                used[chosen] = view.used[rows].numpy()
            assert inputs is not None
            labels = torch.from_numpy(self.split.labels(used))
            if inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield Batch(inputs, labels, torch.from_numpy(used), [])


def views_of_stage(
    num_views: int, *, first_step: int, end_step: int, global_batch_size: int, num_samples: int
) -> tuple[int, ...]:
    """Which views of its cycle the steps of a stage touch, each sample coming once an epoch."""
    first = first_step * global_batch_size // num_samples
    last = (end_step * global_batch_size - 1) // num_samples
    last = min(last, first + num_views - 1)
    return tuple(sorted({epoch % num_views for epoch in range(first, last + 1)}))
