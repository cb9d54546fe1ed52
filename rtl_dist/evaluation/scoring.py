"""Exact evaluation: every sample of a split is scored once, whatever the ranks and batches."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import readable_size
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import Split
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.evaluation.logits import KeptImages, logits_of_split
from rtl_dist.evaluation.metrics import compute_metrics
from rtl_dist.evaluation.predictions import Outcomes, Predictions, outcomes_of
from rtl_dist.features.view import View
from rtl_dist.model.calibration import UNCALIBRATED, Calibration
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.divided import Divided

LOG = logging.getLogger("rtl_dist")
SCORES_BYTES = 2**30


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
    calibration: Calibration = UNCALIBRATED,
) -> Predictions | None:
    """Scores a split, blocks of it shared among the ranks; the model is left in eval mode.

    Args:
        divided: the model, cut; None: it is cut below its head.
        view: what the frozen part makes of this split, to score from.
        kept: images to score, or to be kept.
        keep_scores: where they take at most 1 GiB of rank 0's memory; those of multi-label data
            always are, as their metrics need them all.
        calibration: how the logits are read; they are read as they are, too, if that is another
            way.

    Returns:
        on rank 0 what was said of every sample in index order, elsewhere None.

    Raises:
        RuntimeError: a sample was not counted exactly once; else as ``logits_of_split``.
    """
    readings = [_Reading(calibration, _keeps_scores(dataset, split, keep_scores, runtime))]
    if calibration != UNCALIBRATED:
        readings.append(_Reading(UNCALIBRATED, dataset.task == MULTI_LABEL))
    scored: list[list[_Block]] = [[] for _ in readings]
    with torch.inference_mode():
        for samples, logits in logits_of_split(
            model,
            split,
            runtime=runtime,
            workers=workers,
            divided=divided,
            view=view,
            kept=kept,
        ):
            for reading, blocks in zip(readings, scored, strict=True):
                blocks.append(_block(split, dataset, samples, logits, reading))
    told, *others = [
        _gather(dataset, split, reading, blocks, runtime)
        for reading, blocks in zip(readings, scored, strict=True)
    ]
    if told is None or not others:
        return told
    return replace(told, uncalibrated=others[0])


def _gather(
    dataset: Dataset, split: Split, reading: _Reading, scored: list[_Block], runtime: Runtime
) -> Predictions | None:
    """What all ranks scored, on rank 0; each rank's blocks are let go."""
    gathered = runtime.gather_to_main(scored)
    assembled: list[Predictions] = []

    def assemble() -> None:
        blocks = [block for of_rank in gathered or [] for block in of_rank]
        scored.clear()  # the list, so that ``blocks`` alone holds them
        if gathered:
            gathered.clear()
        assembled.append(_assemble(dataset, split, blocks, reading))

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


@dataclass(frozen=True)
class _Reading:
    """One way in which logits are read."""

    calibration: Calibration
    """Of them."""
    keeps_scores: bool
    """Or the outcomes alone."""


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
    split: Split, dataset: Dataset, samples: np.ndarray, logits: torch.Tensor, reading: _Reading
) -> _Block:
    calibration, task = reading.calibration, dataset.task
    scores = calibration.probabilities(logits, task).cpu().numpy()
    is_multi = task == MULTI_LABEL
    return _Block(
        samples=samples,
        outcomes=None if is_multi else outcomes_of(split.labels(samples), scores, calibration),
        scores=scores if reading.keeps_scores else None,
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
    dataset: Dataset, split: Split, blocks: list[_Block], reading: _Reading
) -> Predictions:
    """Puts the blocks together, each of which is let go."""
    times_seen = np.zeros(split.num_samples, dtype=np.int64)
    scores = None
    if reading.keeps_scores:
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
        calibration=reading.calibration,
    )
