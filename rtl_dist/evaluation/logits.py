"""A model's logits on a split: every sample's once, blocks of them shared among the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from rtl_dist.core.device_memory import InParts
from rtl_dist.core.errors import DataError
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.data.loading.batch import Batch, to_device
from rtl_dist.data.loading.blocks import (
    EVAL_BLOCK,
    blocks_of_rank,
    cannot_evaluate,
    num_rounds,
)
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import SplitMicrobatches
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.view import View
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.divided import Divided, divide


@dataclass(kw_only=True)
class KeptImages:
    """This rank's share of a split as an evaluation looks at it, kept by the first one where there
    is room: later ones then wait for no loader."""

    limit_bytes: int
    """That the images may take."""
    batches: list[Batch] = field(default_factory=list)
    """``inputs`` uint8 (images, channels, height, width), in the host's memory."""
    is_whole: bool = False
    """Whether every batch is there; until then they are of no use."""


def eval_transform(model: Classifier) -> EvalTransform:
    """How an evaluation looks at an image."""
    preprocessing = model.preprocessing
    return EvalTransform(
        image_size=preprocessing.image_size,
        crop_pct=preprocessing.crop_pct,
        channels=preprocessing.channels,
    )


def logits_of_split(
    model: Classifier,
    split: Split,
    *,
    runtime: Runtime,
    workers: int,
    divided: Divided | None = None,
    view: View | None = None,
    kept: KeptImages | None = None,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Sample numbers, int64 (n,), and logits (n, C) on the device of this rank's blocks; the model
    is left in eval mode. Every rank comes to the end of it, within ``torch.inference_mode``.

    Args:
        divided: the model, cut; None: it is cut below its head.
        view: what the frozen part makes of this split, to score from.
        kept: images to score, or to be kept.

    Raises:
        DataError: on every rank, if a sample is damaged.
        RtlDistError: on every rank, if the loader of one failed, or its memory does not hold one
            image.
        StopRequested: on every rank, if one was asked to stop.
    """
    model.eval()
    if divided is None:
        divided = divide(model, "head", dtype=runtime.autocast_dtype)
    if view is not None:
        return logits_from_view(divided, split, view, runtime=runtime)
    transform = eval_transform(model)
    return logits_from_images(divided, split, transform, kept, runtime=runtime, workers=workers)


def logits_from_view(
    divided: Divided, split: Split, view: View, *, runtime: Runtime
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Sample numbers and logits of this rank's blocks, from what the frozen part made of them."""
    what = f"evaluating {split.name}"
    in_parts = InParts(what)

    def logits_of(features: torch.Tensor) -> torch.Tensor:
        with runtime.accelerator.autocast():
            logits: torch.Tensor = divided.trained(features.to(runtime.device))
        return logits

    def scored() -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for first in blocks_of(split, runtime):
            samples = np.arange(first, min(first + EVAL_BLOCK, split.num_samples))
            yield samples, in_parts(logits_of, view.features[first : first + len(samples)])

    for block in runtime.in_rounds(scored(), rounds_of(split, runtime), what=what):
        if block is not None:
            yield block


def blocks_of(split: Split, runtime: Runtime) -> range:
    """The first samples of this rank's blocks."""
    return blocks_of_rank(
        split.num_samples, EVAL_BLOCK, rank=runtime.rank, world_size=runtime.world_size
    )


def rounds_of(split: Split, runtime: Runtime) -> int:
    """How many blocks the rank with the most of them has."""
    return num_rounds(split.num_samples, EVAL_BLOCK, world_size=runtime.world_size)


def logits_from_images(
    divided: Divided,
    split: Split,
    transform: EvalTransform,
    kept: KeptImages | None,
    *,
    runtime: Runtime,
    workers: int,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Sample numbers and logits of this rank's blocks, from the evaluation's view of each image."""
    assert divided.frozen is not None
    blocks = blocks_of(split, runtime)
    microbatches = SplitMicrobatches(split, transform, size=EVAL_BLOCK)
    batches: Iterable[Batch]
    if kept is not None and kept.is_whole:
        batches = (to_device(batch, runtime.device) for batch in kept.batches)
    else:
        batches = make_loader(
            microbatches,
            blocks,
            workers=workers,
            device=runtime.device,
            ring_bytes=runtime.loader_bytes,
            give_up=runtime.is_asked,
        )
        num_bytes = len(blocks) * math.prod(microbatches.shape)
        if kept is not None and num_bytes <= kept.limit_bytes:
            batches = _keeping(kept, batches)
    bad: list[str] = []
    what = f"evaluating {split.name}"
    images = EVAL_BLOCK * runtime.world_size
    with runtime.progress(total=len(blocks), what=what, unit="batch", images=images) as bar:
        batches = runtime.heartbeat.while_fetching(batches, are_remote=split.is_remote)
        scored = _scored(divided, batches, InParts(what), runtime)
        for block in runtime.in_rounds(scored, rounds_of(split, runtime), what=what):
            if block is None:
                continue
            bar.update()
            batch, logits = block
            bad += batch.bad
            if logits is not None:
                yield batch.samples.numpy(), logits
    _refuse_bad(runtime, bad)


def _scored(
    divided: Divided, batches: Iterable[Batch], in_parts: InParts, runtime: Runtime
) -> Iterator[tuple[Batch, torch.Tensor | None]]:
    """Each batch with its logits; None where a sample is damaged."""

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        assert divided.frozen is not None
        with runtime.accelerator.autocast():
            logits: torch.Tensor = divided.trained(divided.frozen(images.to(runtime.device)))
        return logits

    for batch in batches:
        yield batch, None if batch.bad else in_parts(logits_of, batch.inputs)


def _keeping(kept: KeptImages, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, which are kept once all of them have come."""
    copies = []
    for batch in batches:
        copies.append(batch._replace(inputs=batch.inputs.to("cpu", copy=True)))
        yield batch
    kept.batches, kept.is_whole = copies, True


def _refuse_bad(runtime: Runtime, bad: list[str]) -> None:
    every = [name for names in runtime.gather(bad) for name in names]
    if every:
        raise DataError(cannot_evaluate(every))
