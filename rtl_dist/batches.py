"""Where a stage's microbatches come from: pixels from workers, cached features, or a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rtl_dist.config import Config, Stage
from rtl_dist.data.augment import TrainTransform
from rtl_dist.data.dataset import Split
from rtl_dist.data.loader import (
    Batch,
    TrainingMicrobatches,
    make_loader,
    microbatch_positions,
)
from rtl_dist.data.stream import stream_microbatches
from rtl_dist.features import can_cache, compute_features, views_of_stage
from rtl_dist.model.classifier import Classifier
from rtl_dist.runtime import Runtime


@dataclass(kw_only=True)
class StageBatches:
    """This rank's microbatches of a stage, in order. bad: damaged samples met in opening it."""

    iterator: Iterator[Batch]
    are_features: bool = False
    bad: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Ends the workers."""
        self.iterator = iter(())


def open_stage_batches(
    stage: Stage,
    *,
    config: Config,
    model: Classifier,
    split: Split,
    runtime: Runtime,
    first_step: int,
    end_step: int,
    micro_batch_size: int,
    workers: int,
) -> StageBatches:
    """Opens the microbatches of steps ``[first_step, end_step)`` for this rank.

    Raises:
        StopRequested: while features were computed.
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
    if can_cache(config, stage, split, num_features=model.head.in_features):
        assert stage.views is not None
        views = views_of_stage(
            stage,
            first_step=first_step,
            end_step=end_step,
            global_batch_size=global_batch_size,
            num_samples=split.num_samples,
        )
        cache = compute_features(
            model,
            split,
            views,
            config=config,
            runtime=runtime,
            micro_batch_size=micro_batch_size,
            workers=workers,
        )
        iterator = cache.batches(
            positions, size=micro_batch_size, split=split, seed=config.seed, num_views=stage.views
        )
        return StageBatches(iterator=iterator, are_features=True, bad=cache.bad)
    transform = TrainTransform(config.augment, image_size=config.data.image_size)
    pin_memory = runtime.device.type == "cuda"
    if config.data.backend == "stream":
        stream = stream_microbatches(
            config.data,
            transform,
            size=micro_batch_size,
            seed=config.seed,
            first_step=first_step,
            rank=runtime.rank,
            num_classes=model.head.out_features,
            workers=workers,
            pin_memory=pin_memory,
        )
        return StageBatches(iterator=iter(stream))
    microbatches = TrainingMicrobatches(
        split,
        transform,
        size=micro_batch_size,
        channels=config.data.channels,
        seed=config.seed,
        views=stage.views,
    )
    loader = make_loader(microbatches, positions, workers=workers, pin_memory=pin_memory)
    return StageBatches(iterator=iter(loader))
