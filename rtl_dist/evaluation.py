"""Exact evaluation: every sample of a split is scored once, whatever the ranks and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rtl_dist.data.augment import EvalTransform
from rtl_dist.data.dataset import MULTI_LABEL, Dataset
from rtl_dist.data.loader import make_loader
from rtl_dist.data.microbatches import SplitMicrobatches
from rtl_dist.data.split import Split
from rtl_dist.errors import DataError, RtlDistError, StopRequested
from rtl_dist.feature_store import View
from rtl_dist.features import EVAL_BLOCK, cannot_evaluate
from rtl_dist.metrics import Predictions, compute_metrics
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.divided import divide
from rtl_dist.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class FrozenView:
    """A split as the frozen part of the model has it, and the rest, which makes scores of it."""

    view: View
    trained: nn.Module


def eval_transform(model: Classifier) -> EvalTransform:
    """How an evaluation looks at an image."""
    preprocessing = model.preprocessing
    return EvalTransform(
        image_size=preprocessing.image_size,
        crop_pct=preprocessing.crop_pct,
        channels=preprocessing.channels,
    )


def predict_split(
    model: Classifier,
    dataset: Dataset,
    split: Split,
    *,
    runtime: Runtime,
    workers: int,
    frozen: FrozenView | None = None,
) -> Predictions | None:
    """Scores a split, blocks of it shared among the ranks; the model is left in eval mode.

    Args:
        frozen: what the model's frozen part made of this split, to score from.

    Returns:
        on rank 0 every sample's scores in index order, elsewhere None.

    Raises:
        DataError: on every rank, if a sample is damaged.
        RtlDistError: on every rank, if the loader of one failed.
        StopRequested: on every rank, if one was asked to stop.
        RuntimeError: a sample was not counted exactly once.
    """
    model.eval()
    scored: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode():
        if frozen is None:
            blocks = _from_images(model, split, runtime=runtime, workers=workers)
        else:
            blocks = _from_view(frozen, split, runtime=runtime)
        for samples, logits in blocks:
            scores = logits.float()
            scores = scores.sigmoid() if dataset.task == MULTI_LABEL else scores.softmax(1)
            scored.append((samples, scores.cpu().numpy()))
    gathered = runtime.gather_to_main(scored)
    assembled: list[Predictions] = []

    def assemble() -> None:
        blocks = [block for of_rank in gathered or [] for block in of_rank]
        assembled.append(_assemble(dataset, split, blocks))

    runtime.from_main(assemble)  # so that what is wrong there ends every rank
    return assembled[0] if assembled else None


def evaluate_split(
    model: Classifier,
    dataset: Dataset,
    split: Split,
    *,
    runtime: Runtime,
    workers: int,
    frozen: FrozenView | None = None,
) -> dict[str, float]:
    """The split's metrics (see ``metrics``), equal on every rank; raises as ``predict_split``."""
    predictions = predict_split(
        model, dataset, split, runtime=runtime, workers=workers, frozen=frozen
    )

    def compute() -> dict[str, float]:
        assert predictions is not None
        return compute_metrics(predictions)

    metrics: dict[str, float] = runtime.from_main(compute)
    return metrics


def _from_view(
    frozen: FrozenView, split: Split, *, runtime: Runtime
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Sample numbers and logits of this rank's blocks, from what the frozen part made of them."""
    blocks = range(0, split.num_samples, EVAL_BLOCK)[runtime.rank :: runtime.world_size]
    for first in blocks:
        if runtime.was_asked_to_stop:
            break
        samples = np.arange(first, min(first + EVAL_BLOCK, split.num_samples))
        inputs = frozen.view.features[first : first + len(samples)].to(runtime.device)
        with runtime.accelerator.autocast():
            yield samples, frozen.trained(inputs)
    _agree_to_go_on(split, runtime, failure=None)


def _from_images(
    model: Classifier, split: Split, *, runtime: Runtime, workers: int
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Sample numbers and logits of this rank's blocks, after the evaluation's view of each image.

    The trunk is run as a frozen one, BatchNorm folded: what a stage's cached features give.
    """
    divided = divide(model, "head", dtype=runtime.autocast_dtype)
    assert divided.frozen is not None
    blocks = range(0, split.num_samples, EVAL_BLOCK)[runtime.rank :: runtime.world_size]
    loader = make_loader(
        SplitMicrobatches(split, eval_transform(model), size=EVAL_BLOCK),
        blocks,
        workers=min(workers, len(blocks)),
        device=runtime.device,
    )
    bad: list[str] = []
    failure: RtlDistError | None = None
    what = f"evaluating {split.name}"
    with runtime.progress(total=len(blocks), what=what, unit="batch") as bar:
        try:
            for batch in loader:
                bar.update()
                if runtime.was_asked_to_stop:
                    break
                if batch.bad:
                    bad += batch.bad
                    continue
                with runtime.accelerator.autocast():
                    logits = divided.trained(divided.frozen(batch.inputs))
                yield batch.samples.numpy(), logits
        except RtlDistError as error:
            failure = error  # the other ranks are told below
    _agree_to_go_on(split, runtime, failure=failure)
    _refuse_bad(runtime, bad)


def _agree_to_go_on(split: Split, runtime: Runtime, *, failure: RtlDistError | None) -> None:
    if runtime.agree(bad_samples=0, failure=failure)[0]:
        raise StopRequested(f"stopped while evaluating {split.name}; start the same command again")


def _refuse_bad(runtime: Runtime, bad: list[str]) -> None:
    every = [name for names in runtime.gather(bad) for name in names]
    if every:
        raise DataError(cannot_evaluate(every))


def _assemble(
    dataset: Dataset, split: Split, blocks: list[tuple[np.ndarray, np.ndarray]]
) -> Predictions:
    scores = np.zeros((split.num_samples, dataset.num_classes), dtype=np.float32)
    times_seen = np.zeros(split.num_samples, dtype=np.int64)
    for samples, block in blocks:
        scores[samples] = block
        np.add.at(times_seen, samples, 1)
    if not (times_seen == 1).all():
        raise RuntimeError(
            f"split {split.name!r}: {(times_seen != 1).sum()} of {split.num_samples} samples were"
            " not counted exactly once"
        )
    labels = split.labels(np.arange(split.num_samples))
    if dataset.task == MULTI_LABEL:
        labels = labels.astype(np.uint8)
    return Predictions(task=dataset.task, classes=dataset.classes, labels=labels, scores=scores)
