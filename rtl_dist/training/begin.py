"""The beginning of a run: the data set, the weights, and all else that its stages need."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from rtl_dist.config import Config, DataConfig, ResolvedStage
from rtl_dist.config.resolved_stage import resolve_stages
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.urls import is_url
from rtl_dist.data.format.dataset import Dataset, check_split, open_dataset
from rtl_dist.data.format.description import DESCRIPTION
from rtl_dist.data.format.split import Split
from rtl_dist.data.format.trainable import why_untrainable
from rtl_dist.data.loading.workers import resolve_workers
from rtl_dist.data.order.training import training_order
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.terminal import configure_logging
from rtl_dist.evaluation.logits import KeptImages
from rtl_dist.model.average import Average
from rtl_dist.model.build import build_model
from rtl_dist.model.classifier import Classifier, place
from rtl_dist.model.freezing import batchnorm_learns
from rtl_dist.model.parts import trainable_parts
from rtl_dist.model.probe import require_takes
from rtl_dist.model.sync_batchnorm import synchronize_batchnorm
from rtl_dist.records.checkpoint import Snapshot
from rtl_dist.records.checkpoint_writer import CheckpointWriter
from rtl_dist.records.environment import describe_run
from rtl_dist.records.resume import restore
from rtl_dist.records.state import TrainState
from rtl_dist.records.tracking import build_tracker
from rtl_dist.training.finish import left_in_order
from rtl_dist.training.opening_words import say_what_begins
from rtl_dist.training.run import Run
from rtl_dist.training.sharing import overrides_to_share

LOG = logging.getLogger("rtl_dist")
_LOOKED_AT = 1000  # names, where a data set should be


def open_data(config: Config, runtime: Runtime) -> Dataset:
    """Opens ``data.path``, packing ``data.source`` into it first where nothing is there yet.

    Raises:
        DataError: on every rank, if there is no data set or it cannot be packed.
    """
    configure_logging(is_main=runtime.is_main)

    def pack_if_missing() -> None:
        root = Path(config.data.path)
        if is_url(config.data.path) or (root / DESCRIPTION).exists():
            return
        if config.data.source is None:
            _refuse_what_is_to_be_packed(root)
            return
        from rtl_dist.prepare.packing.pack import pack

        LOG.info("packing %s into %s", config.data.source, root)
        report = pack(config.data.source, root, val_fraction=config.data.val_fraction)
        for line in report.remarks:
            LOG.info("%s", line)

    with runtime.heartbeat.phase("packing", open_ended=runtime.is_main):
        runtime.from_main(pack_if_missing)
    data = config.data
    with runtime.heartbeat.phase("opening the data set", open_ended=True):
        return runtime.on_every_rank(
            lambda: open_dataset(
                data.path,
                cache_dir=data.cache_dir,
                cache_gb=data.cache_gb,
                redirects=data.redirects,
            )
        )


def _refuse_what_is_to_be_packed(root: Path) -> None:
    """
    Raises:
        DataError: there are images, or a table of them, where a data set should be.
    """
    from rtl_dist.prepare.sources.items import IMAGE_SUFFIXES

    below = (path for depth in ("*", "*/*", "*/*/*") for path in root.glob(depth))
    first = itertools.islice(below, _LOOKED_AT)
    if root.is_file() or any(path.suffix.lower() in IMAGE_SUFFIXES for path in first):
        raise DataError(
            f"data.path: {root} is no data set yet but what one is packed of; set data.source to it"
            " and data.path to a new folder"
        )


@contextmanager
def open_run(
    config: Config, runtime: Runtime, folder: Path, dataset: Dataset
) -> Iterator[tuple[Run, list[ResolvedStage], Snapshot | None]]:
    """Everything the stages need, the stages that remain, and the checkpoint to go on from.

    The order of initialisation: the run's own checkpoint, else the weights the config names.

    Args:
        config: resolved by ``resolve``.

    Raises:
        UserError, DataError: on every rank, before anything is trained.
    """
    train, val = _open_splits(config, runtime, dataset)
    with runtime.heartbeat.phase("loading weights", open_ended=True):
        restored = restore(folder, config, dataset, runtime)
        if restored is None:
            own = [stage.image_size for stage in config.stages if stage.image_size]
            require_takes(config.model, config.data, [config.data.image_size, *own])
        model, origin = _initial_model(config, dataset, restored, dtype=runtime.dtype)
    _check_stages(config, model, world_size=runtime.world_size)
    average = _place_on_device(model, config, runtime, restored)
    if restored is None and _has_metrics(folder):
        LOG.warning(
            "%s has metrics of an earlier start but no checkpoint: starting from the beginning,"
            " they are replaced",
            folder,
        )
    start: int = runtime.from_main(lambda: describe_run(folder, config, runtime))
    state = restored.state if restored else TrainState()
    say_what_begins(
        config,
        runtime,
        dataset,
        origin=origin,
        train=train,
        val=val,
        start=start,
        restored=restored.state if restored else None,
    )
    run = Run(
        config=config,
        runtime=runtime,
        folder=folder,
        dataset=dataset,
        train=train,
        val=val,
        model=model,
        average=average,
        tracker=build_tracker(folder, config, state, runtime),
        state=state,
        stage_best=restored.stage_best if restored else {},
        val_images=KeptImages(limit_bytes=runtime.kept_bytes),
        writer=CheckpointWriter(),
        workers=resolve_workers(config.data.workers, cpus=runtime.cpus),
    )
    remaining = resolve_stages(config, num_samples=train.num_samples)[state.stage :]
    with left_in_order(run):
        yield run, remaining, restored


def _open_splits(config: Config, runtime: Runtime, dataset: Dataset) -> tuple[Split, Split]:
    """The splits to train on and to evaluate, their files looked at."""
    with runtime.heartbeat.phase("opening the data set", open_ended=True):
        train, val = runtime.on_every_rank(
            lambda: (dataset.split(config.data.train), dataset.split(config.data.val))
        )
        if config.data.test not in (None, DataConfig.test):  # the default one may be missing
            runtime.on_every_rank(lambda: dataset.split(cast(str, config.data.test)))
        _check_classes(dataset, config.data.train, train.class_counts)
        for split in (train, val):
            runtime.from_main(functools.partial(check_split, dataset, split))
    order = functools.partial(training_order, train, config.data, seed=config.seed)
    runtime.on_every_rank(lambda: train.files.require_room(order().most_shards_at_once()))
    return train, val


def _check_stages(config: Config, model: Classifier, *, world_size: int) -> None:
    """Refuses a misspelt part now, not after hours; warns of stages that cannot learn well."""
    for number, stage in enumerate(config.stages):
        parts = trainable_parts(model, stage, key=f"stages.{number}.trainable")
        if config.model.weights == "none" and parts - {"head"} and stage.batchnorm != "train":
            LOG.warning(
                "stage %s trains a network without weights under batchnorm: %s, which holds back"
                " what it can learn; set batchnorm: train",
                stage.name,
                stage.batchnorm,
            )
        one_image = config.batch.micro == 1 and not config.batch.sync_batchnorm
        if one_image and batchnorm_learns(model, stage):
            raise UserError(
                f"batch.micro: is 1, and BatchNorm cannot learn from one image at a time"
                f" (stages.{number}.batchnorm: {stage.batchnorm}): add"
                f" {overrides_to_share(config, world_size, least=2)} to the command, or set"
                " batchnorm: frozen"
            )


def _place_on_device(
    model: Classifier, config: Config, runtime: Runtime, restored: Snapshot | None
) -> Average | None:
    """Moves the model to the device; returns its average, if it is to have one."""
    if config.batch.sync_batchnorm:
        synchronize_batchnorm(model)
    place(model, runtime.device, runtime.dtype)
    average = Average(model, config.optim.ema) if config.optim.ema else None
    if average and restored is not None:
        average.model.load_state_dict(restored.ema)
    return average


def _has_metrics(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def _initial_model(
    config: Config, dataset: Dataset, restored: Snapshot | None, *, dtype: torch.dtype
) -> tuple[Classifier, str]:
    """The model as the run begins or goes on, and where its weights are from."""
    if restored is None:
        return build_model(config.model, config.data, classes=dataset.classes, seed=config.seed)
    untrained = replace(config.model, weights="none")
    model, _ = build_model(untrained, config.data, classes=dataset.classes, seed=config.seed)
    model.to(dtype=dtype)  # before loading, which would round the checkpoint's numbers
    model.load_state_dict(restored.model)
    return model, f"going on from step {restored.state.step}"


def _check_classes(dataset: Dataset, split: str, counts: tuple[int, ...]) -> None:
    if why := why_untrainable(dataset.task, dataset.classes, split, counts):
        raise DataError(
            f"{dataset.where} cannot be trained on: {why}; add images, or pack without that class"
        )
