"""A model calibrated on a split: its logits on every sample, or on evenly many where they are very
many, and what is fitted on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rtl_dist.config import CalibrateConfig
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import Split
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.evaluation.calibrating import LEAST_SAMPLES, fit_calibration
from rtl_dist.evaluation.logits import KeptImages, logits_of_split
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.classifier import Classifier, place

MOST_LOGITS = 2**24  # with which a fit takes seconds


def too_few(split: Split) -> str | None:
    """Why nothing can be fitted on a split; None: it has enough samples."""
    if split.num_samples >= LEAST_SAMPLES:
        return None
    return f"split {split.name} has {split.num_samples:,} images, and it takes {LEAST_SAMPLES}"


def calibrate_on(
    model: Classifier,
    dataset: Dataset,
    split: Split,
    wanted: CalibrateConfig,
    *,
    runtime: Runtime,
    workers: int,
    kept: KeptImages | None = None,
) -> Calibration:
    """What calibrates a model, on every rank the same; called by all of them.

    Args:
        model: is moved to the rank's device, and left in eval mode.
        kept: the split's images, or to be kept.

    Raises:
        DataError: the split has too few samples; else as ``logits_of_split``.
        UserError: the logits are not finite.
    """
    if why := too_few(split):
        raise DataError(f"cannot calibrate: {why}; choose a split that has more")
    place(model, runtime.device, runtime.dtype)
    apart = -(-split.num_samples * dataset.num_classes // MOST_LOGITS)
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    with runtime.heartbeat.phase(f"evaluating {split.name}"), torch.inference_mode():
        for samples, logits in logits_of_split(
            model, split, runtime=runtime, workers=workers, kept=kept
        ):
            rows = np.flatnonzero(samples % apart == 0)
            chosen.append((samples[rows], logits[rows].float().cpu().numpy()))
    gathered = runtime.gather_to_main(chosen)

    def fit() -> Calibration:
        of_blocks = [block for of_rank in gathered or [] for block in of_rank]
        samples = np.concatenate([numbers for numbers, _ in of_blocks])
        order = np.argsort(samples)
        logits = np.concatenate([values for _, values in of_blocks])[order]
        if not np.isfinite(logits).all():
            raise UserError(
                "the model's scores are not finite: its weights diverged; there is nothing to"
                " calibrate"
            )
        labels = split.labels(samples[order])
        if dataset.task == MULTI_LABEL:
            labels = labels.astype(np.uint8)
        return fit_calibration(logits, labels, dataset.task, wanted)

    with runtime.heartbeat.phase("calibrating", open_ended=runtime.is_main):
        fitted: Calibration = runtime.from_main(fit)
    return replace(fitted, split=split.name, dataset_fingerprint=dataset.fingerprint)
