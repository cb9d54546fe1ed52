"""Where a stage's microbatches come from: pixels from workers, cached features, or a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from rtl_dist.config import Config, Stage
from rtl_dist.data.augment import TrainTransform
from rtl_dist.data.loader import make_loader, to_device
from rtl_dist.data.microbatches import TrainingMicrobatches, microbatch_positions
from rtl_dist.data.order import Order
from rtl_dist.data.ring import Batch
from rtl_dist.data.split import Split
from rtl_dist.data.stream import stream_microbatches
from rtl_dist.features import can_cache, compute_features, views_of_stage
from rtl_dist.model.classifier import Classifier
from rtl_dist.runtime import Runtime


@dataclass(kw_only=True)
class StageBatches:
    """This rank's microbatches of a stage, in order.

    stand_in: one of the same shapes that holds nothing. bad: damaged samples met in opening it.
    """

    iterator: Iterator[Batch]
    stand_in: Batch
    are_features: bool = False
    bad: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Ends the workers."""
        self.iterator = iter(())


def training_order(split: Split, config: Config) -> Order:
    """The stream that a config trains on."""
    window = config.data.window if config.data.shuffle == "window" else None
    return split.order(config.seed, window=window)


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
        StopRequested: while features were computed. RtlDistError: a rank's loader failed then.
    """
    size = config.data.image_size
    stand_in = _stand_in((micro_batch_size, config.data.channels, size, size), split, runtime)
    if first_step >= end_step:
        return StageBatches(iterator=iter(()), stand_in=stand_in)
    global_batch_size = config.batch.global_
    positions = microbatch_positions(
        first_step,
        end_step,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    order = training_order(split, config)
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
        batches = cache.batches(
            positions, size=micro_batch_size, split=split, order=order, num_views=stage.views
        )
        return StageBatches(
            iterator=(to_device(batch, runtime.device) for batch in batches),
            stand_in=_stand_in((micro_batch_size, model.head.in_features), split, runtime),
            are_features=True,
            bad=cache.bad,
        )
    transform = TrainTransform(
        config.augment, image_size=config.data.image_size, channels=config.data.channels
    )
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
            device=runtime.device,
        )
        return StageBatches(iterator=iter(stream), stand_in=stand_in)
    microbatches = TrainingMicrobatches(
        split,
        transform,
        order=order,
        size=micro_batch_size,
        views=stage.views,
    )
    loader = make_loader(microbatches, positions, workers=workers, device=runtime.device)
    return StageBatches(iterator=iter(loader), stand_in=stand_in)


def _stand_in(shape: tuple[int, ...], split: Split, runtime: Runtime) -> Batch:
    """Black images, or features of zero, of whatever the first sample is."""
    samples = torch.zeros(shape[0], dtype=torch.int64)
    dtype = torch.uint8 if len(shape) == 4 else runtime.dtype
    labels = torch.from_numpy(split.labels(samples.numpy()))
    return to_device(Batch(torch.zeros(shape, dtype=dtype), labels, samples, []), runtime.device)
