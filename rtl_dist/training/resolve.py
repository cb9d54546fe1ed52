"""A config with every auto made definite, checked against the data."""

from __future__ import annotations

import logging
from dataclasses import replace

from rtl_dist.config import Config, EarlyStopConfig
from rtl_dist.config.checks import SectionError
from rtl_dist.config.recipe import lines_that_hold, recipe_for
from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.training.memory import resolve_micro_batch_size

LOG = logging.getLogger("rtl_dist")


def resolve(config: Config, runtime: Runtime, dataset: Dataset) -> Config:
    """The config with every auto that is part of the run's identity made definite.

    Raises:
        UserError: the processes, the metric or the mixing do not fit the data or the batch.
        DataError: on every rank; ``data.train`` cannot be opened.
    """
    if config.auto_keys:
        with runtime.heartbeat.phase("opening the data set", open_ended=True):
            split = runtime.on_every_rank(lambda: dataset.split(config.data.train))
        config = _by_recipe(config, num_images=split.num_samples)
    elif config.recipe == "auto":
        LOG.info("recipe: nothing is left for it to choose")
    lines = lines_that_hold(config.recipe, config.of_recipe)
    config = replace(config, recipe=list(lines.values()) or None)
    stages = [
        stage
        if stage.early_stop is None
        else replace(
            stage,
            early_stop=_measured(stage.early_stop, dataset, f"stages.{number}.early_stop"),
        )
        for number, stage in enumerate(config.stages)
    ]
    config = replace(
        config,
        precision=runtime.precision,
        early_stop=_measured(config.early_stop, dataset, "early_stop"),
        stages=stages,
    )
    if dataset.task == MULTI_LABEL:
        _require_single_label_options_unused(config)
    if config.batch.sync_batchnorm and runtime.device.type != "cuda":
        raise UserError("batch.sync_batchnorm: torch has it for GPUs only; set it to false")
    micro = resolve_micro_batch_size(config, runtime, num_classes=dataset.num_classes)
    if config.batch.sync_batchnorm and micro * runtime.world_size != config.batch.total:
        raise UserError(
            "batch.sync_batchnorm: takes one microbatch a process, whose layers wait for each"
            f" other; set batch.micro={max(1, config.batch.total // runtime.world_size)}"
        )
    return replace(config, batch=replace(config.batch, micro=micro))


def _by_recipe(config: Config, *, num_images: int) -> Config:
    batch = config.batch
    recipe = recipe_for(config.stages, num_images, batch=batch.global_, micro=batch.micro)
    for line in recipe.told:
        LOG.info("recipe: %s", line)
    told = (config.recipe if isinstance(config.recipe, list) else []) + recipe.told
    try:
        batch = replace(batch, global_=recipe.batch)
        return replace(config, recipe=told, stages=recipe.stages, batch=batch)
    except SectionError as error:  # in how what was chosen goes with what was given
        raise UserError(f"{error} (chosen by the recipe)") from error


def _measured(early_stop: EarlyStopConfig, dataset: Dataset, path: str) -> EarlyStopConfig:
    metric, measured = early_stop.metric, [f"val/{name}" for name in dataset.task.metrics]
    if metric == "auto":
        metric = f"val/{dataset.task.headline}"
    if metric not in measured:
        raise UserError(
            f"{path}.metric: {metric} is not measured on {dataset.task} data; choose"
            f" {', '.join(measured)}"
        )
    return replace(early_stop, metric=metric)


def _require_single_label_options_unused(config: Config) -> None:
    for key in config.mixing_keys():
        raise UserError(f"{key}: needs single-label data; set it to 0")
    if config.data.sampling == "balanced":
        raise UserError("data.sampling: balanced needs single-label data; leave it out")
    for path, optim in config.optim_sections().items():
        if optim.logit_adjustment:
            raise UserError(f"{path}.logit_adjustment: needs single-label data; set it to 0")
        if optim.loss == "cross_entropy":
            raise UserError(f"{path}.loss: cross_entropy needs single-label data; use bce or focal")
