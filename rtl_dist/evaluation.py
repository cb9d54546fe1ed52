"""Exact evaluation: every sample of a split is scored once, whatever the ranks and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from rtl_dist.data.augment import EvalTransform
from rtl_dist.data.dataset import MULTI_LABEL, Dataset
from rtl_dist.data.loader import make_loader
from rtl_dist.data.microbatches import SplitMicrobatches
from rtl_dist.data.split import Split
from rtl_dist.errors import DataError, RtlDistError, StopRequested
from rtl_dist.metrics import Predictions, compute_metrics
from rtl_dist.model.classifier import Classifier
from rtl_dist.runtime import Runtime

_BATCH_SIZE = 64


# One rank's share of a split under a frozen trunk: sample numbers int64 (n,) and features (n, F).
FeatureBlocks = list[tuple[np.ndarray, torch.Tensor]]


def predict_split(
    model: Classifier,
    dataset: Dataset,
    split: Split,
    *,
    runtime: Runtime,
    workers: int,
    features: FeatureBlocks | None = None,
) -> Predictions | None:
    """Scores a split, blocks of it shared among the ranks; the model is left in eval mode.

    Args:
        features: what ``split_features`` made of this split with this trunk, to score from.

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
        if features is None:
            blocks = _forward(model, model, split, runtime=runtime, workers=workers)
        else:
            blocks = iter(features)
        for samples, out in blocks:
            with runtime.accelerator.autocast():
                logits = out if features is None else model.classify(out)
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


@torch.inference_mode()
def split_features(
    model: Classifier, split: Split, *, runtime: Runtime, workers: int
) -> FeatureBlocks:
    """This rank's blocks of a split as the trunk's features, kept on the device. Raises as
    ``predict_split``."""
    model.eval()
    return list(_forward(model, model.features, split, runtime=runtime, workers=workers))


def evaluate_split(
    model: Classifier,
    dataset: Dataset,
    split: Split,
    *,
    runtime: Runtime,
    workers: int,
    features: FeatureBlocks | None = None,
) -> dict[str, float]:
    """The split's metrics (see ``metrics``), equal on every rank; raises as ``predict_split``."""
    predictions = predict_split(
        model, dataset, split, runtime=runtime, workers=workers, features=features
    )

    def compute() -> dict[str, float]:
        assert predictions is not None
        return compute_metrics(predictions)

    metrics: dict[str, float] = runtime.from_main(compute)
    return metrics


def _forward(
    model: Classifier,
    function: Callable[[torch.Tensor], torch.Tensor],
    split: Split,
    *,
    runtime: Runtime,
    workers: int,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """``function`` of this rank's blocks of a split, after the evaluation's view of each image."""
    preprocessing = model.preprocessing
    blocks = range(0, split.num_samples, _BATCH_SIZE)[runtime.rank :: runtime.world_size]
    loader = make_loader(
        SplitMicrobatches(
            split,
            EvalTransform(
                image_size=preprocessing.image_size,
                crop_pct=preprocessing.crop_pct,
                channels=preprocessing.channels,
            ),
            size=_BATCH_SIZE,
        ),
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
                    out = function(batch.inputs)
                yield batch.samples.numpy(), out
        except RtlDistError as error:
            failure = error  # the other ranks are told below
    if runtime.agree(bad_samples=0, failure=failure)[0]:
        raise StopRequested(f"stopped while evaluating {split.name}; start the same command again")
    _refuse_bad(runtime, bad)


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
