"""Where a stage's microbatches come from: pixels from workers, cached features, or a stream."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from rtl_dist.config import Config, ResolvedStage
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import TrainTransform, training_transform
from rtl_dist.data.loading.batch import Batch
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import TrainingMicrobatches, microbatch_positions
from rtl_dist.data.loading.stream import stream_microbatches
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.data.order.training import training_order
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.ahead import batches_ahead
from rtl_dist.features.maker import FeatureMaker
from rtl_dist.features.microbatches import ViewMicrobatches, views_of_stage

LOG = logging.getLogger("rtl_dist")


@dataclass(frozen=True, kw_only=True)
class StageReading:
    """What one rank reads to train a stage."""

    stage: ResolvedStage
    """What it is to see: views, augmentation, image size."""
    config: Config
    """The run's."""
    split: Split
    """The one trained on."""
    first_step: int
    """Counted over the whole run, as ``end_step`` is."""
    end_step: int
    """The first step that is not read for."""
    micro_batch_size: int
    """Samples of a microbatch."""
    runtime: Runtime
    """Which rank this is, its device, and whether it is asked to stop."""
    workers: int
    """Processes that read for this rank; 0: it does so itself."""

    @property
    def global_batch_size(self) -> int:
        return self.config.batch.total

    @property
    def transform(self) -> TrainTransform:
        return training_transform(self.stage, channels=self.config.data.channels)

    def order(self) -> TrainingStream:
        """The stream that the stage trains on."""
        return training_order(self.split, self.config.data, seed=self.config.seed)

    def positions(self) -> Iterator[int]:
        """This rank's microbatches in the training stream."""
        return microbatch_positions(
            self.first_step,
            self.end_step,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )


@dataclass(kw_only=True)
class StageBatches:
    """This rank's microbatches of a stage."""

    at: Callable[[Iterable[int]], Iterator[Batch]]
    """Those at positions of the training stream, on the rank's device, each lent until the next is
    asked for; of a stream that has no positions, as many from its start."""
    iterator: Iterator[Batch]
    """Those that the stage trains on, in order; started by the first that is asked for."""
    are_features: bool = False
    """They hold what the frozen part made of the images, not images."""
    bad: list[str] = field(default_factory=list)
    """What each damaged sample met in opening them suffers from."""

    def close(self) -> None:
        """Ends the workers."""
        self.iterator = iter(())


def open_stage_batches(
    reading: StageReading, *, features: FeatureMaker | None, num_classes: int
) -> StageBatches:
    """Opens the microbatches of a stage's steps for this rank; called by all ranks.

    Args:
        features: of the stage's frozen part, if it has one.

    Raises:
        StopRequested: while features were computed. RtlDistError: a rank's loader failed then.
    """
    if reading.first_step >= reading.end_step:
        return StageBatches(at=lambda positions: iter(()), iterator=iter(()))
    cached = None
    if features is not None and reading.config.data.backend != "stream":
        cached = _open_features(reading, features)
    if cached is None:
        at = functools.partial(_images_at, reading, num_classes)
        return StageBatches(at=at, iterator=at(reading.positions()))
    at = functools.partial(batches_ahead, cached, device=reading.runtime.device)
    return StageBatches(
        at=at, iterator=at(reading.positions()), are_features=True, bad=list(cached.bad)
    )


def _images_at(
    reading: StageReading, num_classes: int, positions: Iterable[int]
) -> Iterator[Batch]:
    if reading.config.data.backend == "stream":
        batches = _stream(reading, num_classes=num_classes)
        yield from (batch for _, batch in zip(positions, batches, strict=False))
        return
    microbatches = TrainingMicrobatches(
        reading.split,
        reading.transform,
        order=reading.order(),
        size=reading.micro_batch_size,
        views=reading.stage.views,
    )
    yield from make_loader(
        microbatches,
        positions,
        workers=reading.workers,
        device=reading.runtime.device,
        ring_bytes=reading.runtime.loader_bytes,
        give_up=reading.runtime.is_asked,
    )


def _stream(reading: StageReading, *, num_classes: int) -> Iterable[Batch]:
    assert reading.config.data.stream_urls is not None  # the config was checked
    return stream_microbatches(
        reading.config.data.stream_urls,
        reading.transform,
        size=reading.micro_batch_size,
        seed=reading.config.seed,
        first_step=reading.first_step,
        rank=reading.runtime.rank,
        num_classes=num_classes,
        workers=reading.workers,
        device=reading.runtime.device,
    )


def _open_features(reading: StageReading, features: FeatureMaker) -> ViewMicrobatches | None:
    """None where the stage trains on images, or had better."""
    stage, split, config = reading.stage, reading.split, reading.config
    if stage.views is None:
        return None
    if stage.augment.mixes:
        LOG.info("no cached features of %s: mixup and cutmix mix the pixels", split.name)
        return None
    numbers = tuple(range(stage.views))
    if config.data.sampling == "natural":
        numbers = views_of_stage(
            stage.views,
            first_step=reading.first_step,
            end_step=reading.end_step,
            global_batch_size=reading.global_batch_size,
            num_samples=split.num_samples,
        )
    to_come = (reading.end_step - reading.first_step) * reading.global_batch_size
    views = features.training_views(split, numbers, samples_to_come=to_come)
    if views is None:
        return None
    return ViewMicrobatches(
        views=views,
        num_views=stage.views,
        order=reading.order(),
        split=split,
        size=reading.micro_batch_size,
    )
