"""Exact evaluation: every sample of a split is scored once, whatever the ranks and batches."""

from __future__ import annotations

import numpy as np
import torch

from rtl_dist.data.augment import EvalTransform
from rtl_dist.data.dataset import MULTI_LABEL, Dataset, Split
from rtl_dist.data.loader import SplitMicrobatches, make_loader
from rtl_dist.errors import DataError
from rtl_dist.metrics import Predictions, compute_metrics
from rtl_dist.model.classifier import Classifier
from rtl_dist.runtime import Runtime

_BATCH_SIZE = 64


def predict_split(
    model: Classifier, dataset: Dataset, split: Split, *, runtime: Runtime, workers: int
) -> Predictions | None:
    """Scores a split, blocks of it shared among the ranks; the model is left in eval mode.

    Returns:
        on rank 0 every sample's scores in index order, elsewhere None.

    Raises:
        DataError: on every rank, if a sample is damaged or was not counted exactly once.
    """
    preprocessing = model.preprocessing
    blocks = range(0, split.num_samples, _BATCH_SIZE)[runtime.rank :: runtime.world_size]
    loader = make_loader(
        SplitMicrobatches(
            split,
            EvalTransform(image_size=preprocessing.image_size, crop_pct=preprocessing.crop_pct),
            size=_BATCH_SIZE,
            channels=preprocessing.channels,
        ),
        blocks,
        workers=min(workers, len(blocks)),
        pin_memory=runtime.device.type == "cuda",
    )
    model.eval()
    scored: list[tuple[np.ndarray, np.ndarray]] = []
    bad: list[str] = []
    with (
        torch.inference_mode(),
        runtime.progress(total=len(blocks), what=f"evaluating {split.name}", unit="batch") as bar,
    ):
        for batch in loader:
            images = batch.inputs.to(runtime.device, non_blocking=True)
            with runtime.accelerator.autocast():
                logits = model(images)
            scores = (
                logits.float().sigmoid()
                if dataset.task == MULTI_LABEL
                else (logits.float().softmax(1))
            )
            scored.append((batch.samples.numpy().copy(), scores.cpu().numpy()))
            bad += batch.bad
            bar.update()
    _refuse_bad(runtime, bad)
    gathered = runtime.gather_to_main(scored)
    if gathered is None:
        return None
    return _assemble(dataset, split, [block for of_rank in gathered for block in of_rank])


def evaluate_split(
    model: Classifier, dataset: Dataset, split: Split, *, runtime: Runtime, workers: int
) -> dict[str, float]:
    """The split's metrics (see ``metrics``), the same on every rank. Raises as ``predict_split``."""
    predictions = predict_split(model, dataset, split, runtime=runtime, workers=workers)
    metrics: dict[str, float] = runtime.from_main(
        lambda: compute_metrics(predictions)  # type: ignore[arg-type]
    )
    return metrics


def _refuse_bad(runtime: Runtime, bad: list[str]) -> None:
    every = [name for names in runtime.gather(bad) for name in names]
    if every:
        more = f", and {len(every) - 1} more" if len(every) > 1 else ""
        raise DataError(f"cannot evaluate exactly: {every[0]}{more}")


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
