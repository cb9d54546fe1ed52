"""A model evaluated: every sample of a split is scored, and all there is to say of it written.

The end of a run does so with its best weights, ``rtl-dist evaluate`` with any model.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rtl_dist.config import Precision
from rtl_dist.core.errors import UserError
from rtl_dist.core.files import read_object
from rtl_dist.core.tolerated import tolerated
from rtl_dist.core.urls import Redirects
from rtl_dist.data.format.dataset import Dataset, check_split, open_dataset
from rtl_dist.data.format.split import Split
from rtl_dist.data.loading.workers import resolve_workers
from rtl_dist.distributed.precision import precision_as_trained
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.stopping import StopRequests
from rtl_dist.distributed.terminal import configure_logging
from rtl_dist.evaluation.calibrated import RAW
from rtl_dist.evaluation.predictions import Predictions
from rtl_dist.evaluation.same_classes import require_same_classes
from rtl_dist.evaluation.scoring import metrics_on_every_rank, score_split
from rtl_dist.inference.export.exported import open_model
from rtl_dist.model.calibration import UNCALIBRATED, Calibration
from rtl_dist.model.classifier import Classifier, place

LOG = logging.getLogger("rtl_dist")
_OVERWRITTEN = (
    "metrics.json",
    "report.html",
    *(f"{name}.csv" for name in ("confusion_matrix", "mistakes", "per_class", "predictions")),
    *(f"{name}.png" for name in ("calibration", "confusion_matrix", "mistakes")),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredSplit:
    """A split that was scored."""

    metrics: dict[str, float]
    """On every rank the same, ``num_samples`` among them."""
    split: Split
    """That was scored."""
    predictions: Predictions | None
    """Of every sample, on rank 0."""
    model: Classifier
    """That scored it."""

    def write(self, out: Path, *, title: str) -> None:
        """Writes what ``write_evaluation`` does, and raises as it; on rank 0 alone."""
        from rtl_dist.report.evaluation import write_evaluation  # not at start

        assert self.predictions is not None
        metrics = {name: value for name, value in self.metrics.items() if name != "num_samples"}
        write_evaluation(
            self.predictions,
            out,
            split=self.split,
            metrics=metrics,
            title=title,
            model=self.model if self.model.shows_layers else None,
        )


def score_with(
    model: Classifier,
    dataset: Dataset,
    split_name: str,
    *,
    runtime: Runtime,
    workers: int,
    calibration: Calibration,
) -> ScoredSplit:
    """Scores a split; called by all ranks.

    Args:
        model: is moved to the rank's device, and left in eval mode.
        workers: of this rank's loader.

    Raises:
        DataError: no such split, or a sample is damaged.
        RtlDistError: the loader of a rank failed.
        StopRequested: a rank was asked to stop.
    """
    split = runtime.on_every_rank(lambda: dataset.split(split_name))
    runtime.from_main(lambda: check_split(dataset, split))
    place(model, runtime.device, runtime.dtype)
    with runtime.heartbeat.phase(f"evaluating {split_name}"):
        predictions = score_split(
            model, dataset, split, runtime=runtime, workers=workers, calibration=calibration
        )
    metrics = metrics_on_every_rank(predictions, runtime) | {"num_samples": split.num_samples}
    return ScoredSplit(metrics=metrics, split=split, predictions=predictions, model=model)


def evaluate(
    model_path: str,
    data_path: str,
    split_name: str | None,
    *,
    out: Path | None = None,
    workers: Literal["auto"] | int = "auto",
    precision: Precision | None = None,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    redirects: Redirects = "origin",
    raw: bool = False,
) -> str:
    """Evaluates a model and writes tables and pictures into ``out``.

    Args:
        split_name: None takes test where there is one, else val.
        out: None takes ``evaluation/<split>`` in the model's folder, or in one of a file's name.
        cache_dir, cache_gb, redirects: of remote data; see ``Cache``.
        raw: whether the model's calibration is left out.

    Works on one process or, under a launcher, on many, with the same figures.

    Returns:
        one line on rank 0, elsewhere "".

    Raises:
        UserError: no such model, or its head is for other classes than the data's.
        DataError: no such data or split, or a damaged sample.
    """
    loaded = open_model(model_path)
    here = precision or precision_as_trained(loaded.precision)
    with StopRequests() as stops, Runtime(here, stops) as runtime:
        configure_logging(is_main=runtime.is_main)
        if precision is None and here != loaded.precision:
            LOG.info(
                "trained in %s, which is not for this device (%s): evaluated in %s",
                loaded.precision,
                runtime.device_name,
                runtime.precision,
            )
        dataset = runtime.on_every_rank(
            lambda: open_dataset(
                data_path, cache_dir=cache_dir, cache_gb=cache_gb, redirects=redirects
            )
        )
        require_same_classes(loaded, dataset)
        name = split_name or dataset.judging_split
        out = out or usual_out(Path(model_path), name)
        runtime.from_main(lambda: _require_own_folder(out))
        scored = score_with(
            loaded.model,
            dataset,
            name,
            runtime=runtime,
            workers=resolve_workers(workers, cpus=runtime.cpus),
            calibration=UNCALIBRATED if raw else loaded.calibration,
        )
        with runtime.heartbeat.phase("drawing", open_ended=runtime.is_main):
            runtime.from_main(lambda: scored.write(out, title=f"{model_path} on {name}"))
            runtime.from_main(lambda: _refresh_page(Path(model_path), out))
        metrics = scored.metrics
        if not runtime.is_main:
            return ""
        figures = ", ".join(f"{key} {metrics[key]:.4f}" for key in dataset.task.shown)
        if f"ece{RAW}" in metrics:
            figures += f", ece {metrics['ece']:.4f} (raw {metrics[f'ece{RAW}']:.4f})"
        return f"{name}: {figures} on {metrics['num_samples']:,} images. See {out}/report.html"


def usual_out(model: Path, split: str) -> Path:
    """Where an evaluation goes if nothing else is asked for: in the model's folder; of an exported
    file in one of its name, without the ending."""
    return (model.with_suffix("") if model.is_file() else model) / "evaluation" / split


def _require_own_folder(out: Path) -> None:
    """
    Raises:
        UserError: it is none, or its files of the names that we write are not of an evaluation.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; give a folder")
    # a trial, or all images would be scored first
    there = next(above for above in (out, *out.absolute().parents) if above.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"--out: cannot write into {there}: {error.strerror}; choose another folder"
        ) from error
    if "num_samples" in read_object(out / "metrics.json"):
        return
    taken = [name for name in _OVERWRITTEN if os.path.lexists(out / name)]
    if taken:
        raise UserError(
            f"--out: {out} holds {taken[0]}, which is of no evaluation and would be overwritten;"
            " choose another folder"
        )


def _refresh_page(run: Path, out: Path) -> None:
    """A run's page shows its evaluations: it is drawn again, where there is one."""
    from rtl_dist.report.run import REPORT, draw_run

    if out.resolve().parent != (run / "evaluation").resolve() or not (run / REPORT).exists():
        return
    with tolerated(f"{run / REPORT} could not be drawn again"):
        draw_run(run)
