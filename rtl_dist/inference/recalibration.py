"""``rtl-dist calibrate``: a model folder calibrated anew, by a split of data that it may never have
seen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rtl_dist.config import CalibrateConfig, Precision, read_run_config
from rtl_dist.core.errors import UserError
from rtl_dist.core.lock import require_unlocked
from rtl_dist.core.text import command
from rtl_dist.core.urls import Redirects
from rtl_dist.data.format.dataset import Dataset, check_split, open_dataset
from rtl_dist.data.loading.workers import resolve_workers
from rtl_dist.distributed.precision import precision_as_trained
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.stopping import StopRequests
from rtl_dist.distributed.terminal import configure_logging
from rtl_dist.evaluation.calibrate import calibrate_on
from rtl_dist.evaluation.same_classes import require_same_classes
from rtl_dist.model.folder import DESCRIPTION, LoadedModel, load_model, write_calibration


def calibrate(
    model_path: str,
    data_path: str,
    split_name: str = "val",
    *,
    wanted: CalibrateConfig,
    workers: Literal["auto"] | int = "auto",
    precision: Precision | None = None,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    redirects: Redirects = "origin",
) -> str:
    """Fits what makes a model's probabilities mean something, and writes it into its folder.

    Args:
        cache_dir, cache_gb, redirects: of remote data; see ``Cache``.

    Works on one process or, under a launcher, on many, with the same result.

    Returns:
        one line on rank 0, elsewhere "".

    Raises:
        UserError: no such model, one without a place to keep it, or of other classes than the
            data's; it was trained on that split; its run is under way.
        DataError: no such data or split, too few samples, or a damaged one.
    """
    loaded = load_model(model_path)
    _require_place(loaded)
    here = precision or precision_as_trained(loaded.precision)
    with StopRequests() as stops, Runtime(here, stops) as runtime:
        configure_logging(is_main=runtime.is_main)
        dataset = runtime.on_every_rank(
            lambda: open_dataset(
                data_path, cache_dir=cache_dir, cache_gb=cache_gb, redirects=redirects
            )
        )
        require_same_classes(loaded, dataset)
        split = runtime.on_every_rank(lambda: dataset.split(split_name))
        runtime.from_main(lambda: check_split(dataset, split))
        runtime.from_main(lambda: _require_not_trained_on(loaded, dataset, split_name))
        calibration = calibrate_on(
            loaded.model,
            dataset,
            split,
            wanted,
            runtime=runtime,
            workers=resolve_workers(workers, cpus=runtime.cpus),
        )
        runtime.from_main(lambda: write_calibration(loaded.source, calibration))
        if not runtime.is_main:
            return ""
        again = command("evaluate", model_path, "--data", data_path)
        return f"{loaded.source}: {calibration.told()}. Next: {again}"


def _require_place(loaded: LoadedModel) -> None:
    """
    Raises:
        UserError: the model's folder has nothing that says how its scores are read, or a job writes
            it.
    """
    folder = loaded.source
    if not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"{folder} is a checkpoint, which keeps no calibration; give the run folder, whose"
            " best/ does"
        )
    if _is_of_run(folder):
        require_unlocked(folder.parent)


def _require_not_trained_on(loaded: LoadedModel, dataset: Dataset, split: str) -> None:
    """
    Raises:
        UserError: the split is what the model's run trained on, where it is sure of that too often.
    """
    if not _is_of_run(loaded.source) or loaded.dataset_fingerprint != dataset.fingerprint:
        return
    if read_run_config(loaded.source.parent).data.train == split:
        raise UserError(
            f"--split: {loaded.source} was trained on split {split}, of which it is surer than of"
            " other images; choose another"
        )


def _is_of_run(folder: Path) -> bool:
    return folder.name == "best" and (folder.parent / "config.yaml").is_file()
