"""Exact evaluation: every sample of a split is scored once, whatever the ranks and batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL, Task
from rtl_dist.core.text import readable_size
from rtl_dist.data.format.dataset import Dataset
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
from rtl_dist.evaluation.metrics import compute_metrics
from rtl_dist.evaluation.predictions import Outcomes, Predictions, outcomes_of
from rtl_dist.features.view_files import View
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.divided import Divided, divide

LOG = logging.getLogger("rtl_dist")
KEPT_BYTES = 2**30
SCORES_BYTES = 2**30


@dataclass(kw_only=True)
class KeptImages:
    """This rank's share of a split as an evaluation looks at it, kept by the first one if it takes
    at most 1 GiB of the host's memory: later ones then wait for no loader."""

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


def score_split(
    model: Classifier,
    dataset: Dataset,
    split: Split,
    *,
    runtime: Runtime,
    workers: int,
    divided: Divided | None = None,
    view: View | None = None,
    kept: KeptImages | None = None,
    keep_scores: bool = True,
    calibration: Calibration | None = None,
) -> Predictions | None:
    """Scores a split, blocks of it shared among the ranks; the model is left in eval mode.

    Args:
        divided: the model, cut; None: it is cut below its head.
        view: what the frozen part makes of this split, to score from.
        kept: images to score, or to be kept.
        keep_scores: where they take at most 1 GiB of rank 0's memory; those of multi-label data
            always are, as their metrics need them all.
        calibration: how the scores are read; None: as they are.

    Returns:
        on rank 0 what was said of every sample in index order, elsewhere None.

    Raises:
        DataError: on every rank, if a sample is damaged.
        RtlDistError: on every rank, if the loader of one failed.
        StopRequested: on every rank, if one was asked to stop.
        RuntimeError: a sample was not counted exactly once.
    """
    model.eval()
    if divided is None:
        divided = divide(model, "head", dtype=runtime.autocast_dtype)
    calibration = calibration or Calibration()
    keep_scores = _keeps_scores(dataset, split, keep_scores, runtime)
    scored: list[_Block] = []
    with torch.inference_mode():
        if view is None:
            transform = eval_transform(model)
            blocks = logits_from_images(
                divided, split, transform, kept, runtime=runtime, workers=workers
            )
        else:
            blocks = logits_from_view(divided, split, view, runtime=runtime)
        for samples, logits in blocks:
            scores = calibration.probabilities(logits, dataset.task)
            scored.append(_block(split, dataset.task, samples, scores.cpu().numpy(), keep_scores))
    gathered = runtime.gather_to_main(scored)
    assembled: list[Predictions] = []

    def assemble() -> None:
        blocks = [block for of_rank in gathered or [] for block in of_rank]
        scored.clear()  # the list, so that ``blocks`` alone holds them
        if gathered:
            gathered.clear()
        assembled.append(_assemble(dataset, split, blocks, keep_scores))

    runtime.from_main(assemble)  # so that what is wrong there ends every rank
    return assembled[0] if assembled else None


def metrics_on_every_rank(predictions: Predictions | None, runtime: Runtime) -> dict[str, float]:
    """The metrics (see ``metrics``) of what ``score_split`` returned; called by all ranks."""

    def compute() -> dict[str, float]:
        assert predictions is not None
        return compute_metrics(predictions)

    with runtime.heartbeat.phase("computing metrics", open_ended=runtime.is_main):
        metrics: dict[str, float] = runtime.from_main(compute)
    return metrics


def logits_from_view(
    divided: Divided, split: Split, view: View, *, runtime: Runtime
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Sample numbers and logits of this rank's blocks, from what the frozen part made of them."""
    blocks = blocks_of(split, runtime)
    for first in runtime.in_rounds(
        blocks, rounds_of(split, runtime), what=f"evaluating {split.name}"
    ):
        if first is None:
            continue
        samples = np.arange(first, min(first + EVAL_BLOCK, split.num_samples))
        inputs = view.features[first : first + len(samples)].to(runtime.device)
        with runtime.accelerator.autocast():
            yield samples, divided.trained(inputs)


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
            give_up=runtime.is_asked,
        )
        if kept is not None and len(blocks) * math.prod(microbatches.shape) <= KEPT_BYTES:
            batches = _keeping(kept, batches)
    bad: list[str] = []
    what = f"evaluating {split.name}"
    images = EVAL_BLOCK * runtime.world_size
    with runtime.progress(total=len(blocks), what=what, unit="batch", images=images) as bar:
        batches = runtime.heartbeat.while_fetching(batches, are_remote=split.is_remote)
        for batch in runtime.in_rounds(batches, rounds_of(split, runtime), what=what):
            if batch is None:
                continue
            bar.update()
            if batch.bad:
                bad += batch.bad
                continue
            with runtime.accelerator.autocast():
                logits = divided.trained(divided.frozen(batch.inputs))
            yield batch.samples.numpy(), logits
    _refuse_bad(runtime, bad)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """What is kept of samples that were scored together."""

    samples: np.ndarray
    """int64 (N,): their numbers."""
    outcomes: Outcomes | None
    """None of multi-label data."""
    scores: np.ndarray | None
    """float32 (N, C); None: they are not kept."""


def _block(
    split: Split, task: Task, samples: np.ndarray, scores: np.ndarray, keep_scores: bool
) -> _Block:
    return _Block(
        samples=samples,
        outcomes=None if task == MULTI_LABEL else outcomes_of(split.labels(samples), scores),
        scores=scores if keep_scores else None,
    )


def _keeps_scores(dataset: Dataset, split: Split, wanted: bool, runtime: Runtime) -> bool:
    """Whether rank 0 is to have the scores of all samples, which grow with samples x classes."""
    num_bytes = split.num_samples * dataset.num_classes * 4
    if dataset.task == MULTI_LABEL:
        if num_bytes > SCORES_BYTES and runtime.is_main:
            LOG.warning(
                "the scores of split %s take %s of rank 0's memory (%s samples x %s classes)",
                split.name,
                readable_size(num_bytes),
                f"{split.num_samples:,}",
                f"{dataset.num_classes:,}",
            )
        return True
    return wanted and num_bytes <= SCORES_BYTES


def _assemble(
    dataset: Dataset, split: Split, blocks: list[_Block], keep_scores: bool
) -> Predictions:
    """Puts the blocks together, each of which is let go."""
    times_seen = np.zeros(split.num_samples, dtype=np.int64)
    scores = None
    if keep_scores:
        scores = np.zeros((split.num_samples, dataset.num_classes), dtype=np.float32)
    columns: dict[str, np.ndarray] = {}
    while blocks:
        block = blocks.pop()
        np.add.at(times_seen, block.samples, 1)
        if scores is not None:
            scores[block.samples] = block.scores
        for name, values in (vars(block.outcomes) if block.outcomes else {}).items():
            whole = columns.setdefault(name, np.zeros(split.num_samples, dtype=values.dtype))
            whole[block.samples] = values
    if not (times_seen == 1).all():
        raise RuntimeError(
            f"split {split.name!r}: {(times_seen != 1).sum()} of {split.num_samples} samples were"
            " not counted exactly once"
        )
    labels = split.labels(np.arange(split.num_samples))
    if dataset.task == MULTI_LABEL:
        labels = labels.astype(np.uint8)
    return Predictions(
        task=dataset.task,
        classes=dataset.classes,
        labels=labels,
        scores=scores,
        outcomes=Outcomes(**columns) if columns else None,
    )
