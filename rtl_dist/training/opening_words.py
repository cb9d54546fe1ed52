"""What a run says before its first step: what it trains, on what, and what may be amiss."""

from __future__ import annotations

import logging
import os
import socket
import time

from rtl_dist.config import Config
from rtl_dist.config.resolved_stage import resolve_stages
from rtl_dist.core.text import duration
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import Split
from rtl_dist.distributed.hardware import described, shortfall
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.records.state import TrainState

LOG = logging.getLogger("rtl_dist")
_FEW_SAMPLES = 100
_FEW_STEPS = 10


def say_what_begins(
    config: Config,
    runtime: Runtime,
    dataset: Dataset,
    *,
    origin: str,
    train: Split,
    val: Split,
    start: int,
    restored: TrainState | None,
) -> None:
    """
    Args:
        origin: of the weights.
        start: its number among all starts of this run, from 1.
        restored: what it goes on from; None: it begins.
    """
    LOG.info(
        "%s: %s; %d classes, %s training and %s validation images",
        config.model.name,
        origin,
        dataset.num_classes,
        f"{train.num_samples:,}",
        f"{val.num_samples:,}",
    )
    where = described(runtime.device, runtime.precision, local_world_size=runtime.local_world_size)
    day = time.strftime("%Y-%m-%d")
    LOG.info("%s: %d process(es) on %s", day, runtime.world_size, where)
    if runtime.accelerator.is_local_main_process:
        for what in shortfall(
            runtime.device, local_world_size=runtime.local_world_size, cpus=runtime.cpus
        ):
            LOG.warning("%s: %s", socket.gethostname(), what)
    if start > 1:
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        requeued = f" (requeued by SLURM, {restart} so far)" if restart not in ("", "0") else ""
        LOG.info(
            "start %d of this run%s: %s",
            start,
            requeued,
            f"it goes on from step {restored.step}, reached in {duration(restored.elapsed_s)}"
            if restored
            else "from the beginning, as nothing was saved before",
        )
    if runtime.is_main:
        _say_what_is_little(config, train, val)


def _say_what_is_little(config: Config, train: Split, val: Split) -> None:
    if val.num_samples < _FEW_SAMPLES:
        LOG.info(
            "split %s has %d images: one of them is %.1f points, so read its figures with care",
            val.name,
            val.num_samples,
            100 / val.num_samples,
        )
    stages = resolve_stages(config, num_samples=train.num_samples)
    for given, stage in zip(config.stages, stages, strict=True):
        if given.epochs is not None and 0 < stage.num_steps < _FEW_STEPS:
            LOG.warning(
                "stage %s takes only %d step(s): %g epoch(s) of %d images in batches of %d; lower"
                " batch.global, give it more epochs, or leave them to recipe: auto",
                stage.name,
                stage.num_steps,
                given.epochs,
                train.num_samples,
                config.batch.total,
            )
