"""Figures of what a method said of every validation image; the same arithmetic for every method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accuracy_sets import Prepared
from scores import read_scores

from rtl_dist.core.tasks import Task
from rtl_dist.evaluation.metrics import compute_metrics, wilson_interval
from rtl_dist.evaluation.predictions import Predictions

NUM_RESAMPLES = 200


def figures(prepared: Prepared, scores_file: Path) -> dict[str, dict[str, float | list[float]]]:
    """``all`` and, where near copies of training images were looked for, ``clean`` without them:
    ``value`` (top-1; multi-label: mAP), its 95 % ``interval``, ``macro_f1`` and ``num_images``.

    Raises:
        ValueError: an image of the validation split was not scored, or another one was.
    """
    scores = read_scores(scores_file)
    if scores.keys() != prepared.labels.keys():
        raise ValueError(
            f"{prepared.name}: {len(scores)} images were scored, and val has {len(prepared.labels)}"
        )
    parts = {"all": list(prepared.labels)}
    if prepared.near_copies:
        parts["clean"] = [stem for stem in prepared.labels if stem not in prepared.near_copies]
    return {part: _of(prepared, scores, stems) for part, stems in parts.items()}


def _of(
    prepared: Prepared, scores: dict[str, np.ndarray], stems: list[str]
) -> dict[str, float | list[float]]:
    said = np.stack([scores[stem] for stem in stems])
    if prepared.is_multi_label:
        truth = np.zeros(said.shape, np.uint8)
        for row, stem in zip(truth, stems, strict=True):
            row[list(prepared.labels[stem])] = 1
    else:
        truth = np.array([prepared.labels[stem][0] for stem in stems])
    task = Task.MULTI_LABEL if prepared.is_multi_label else Task.SINGLE_LABEL
    predictions = Predictions(task=task, classes=prepared.classes, labels=truth, scores=said)
    found = compute_metrics(predictions)
    if prepared.is_multi_label:
        interval = _bootstrap(predictions)
    else:
        interval = wilson_interval(round(found["top1"] * len(stems)), len(stems))
    return {
        "value": found[prepared.metric],
        "interval": list(interval),
        "macro_f1": found["macro_f1"],
        "num_images": len(stems),
    }


def _bootstrap(predictions: Predictions) -> tuple[float, float]:
    """The 95 % interval of mAP from images drawn with replacement: it is no proportion."""
    draw, found = np.random.default_rng(0), []
    for _ in range(NUM_RESAMPLES):
        rows = draw.integers(0, predictions.num_samples, predictions.num_samples)
        resampled = Predictions(
            task=predictions.task,
            classes=predictions.classes,
            labels=predictions.labels[rows],
            scores=predictions.of_multi_label[rows],
        )
        found.append(compute_metrics(resampled)["map"])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
