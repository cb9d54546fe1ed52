"""Where a run goes on from: its newest whole checkpoint, and what it resolved when it began."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

from rtl_dist.config import Config, read_run_config
from rtl_dist.config.recipe import lines_that_hold
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.records.checkpoint import (
    Snapshot,
    has_checkpoint,
    load_checkpoint_of,
    load_newest_checkpoint,
)
from rtl_dist.records.identity import refuse_other_identity, run_identity

LOG = logging.getLogger("rtl_dist")


def keep_resolved(config: Config) -> Config:
    """The config with what an earlier start of this run resolved: the canonical microbatch, the
    precision and what a recipe chose are part of the run, whatever it goes on with."""
    run = Path(config.run.dir)
    if not has_checkpoint(run):
        return config
    earlier = read_run_config(run)
    if config.auto_keys:
        config = _keep_recipe(config, earlier)
    if config.batch.micro == "auto":
        config = replace(config, batch=replace(config.batch, micro=earlier.batch.micro))
    if config.precision == "auto":
        config = replace(config, precision=earlier.precision)
    return config


def _keep_recipe(config: Config, earlier: Config) -> Config:
    """The config with each auto as it was chosen then; what was given then stays auto, and is
    chosen now, which may not be the same: the run's identity tells."""
    chosen = lines_that_hold(earlier.recipe, earlier.of_recipe).keys() & set(config.auto_keys)
    batch, then = config.batch, earlier.batch
    if "batch.global" in chosen and batch.micro in ("auto", then.micro):
        batch = replace(batch, global_=then.global_)
    stages = list(config.stages)
    for number, stage in enumerate(earlier.stages[: len(stages)]):
        if f"stages.{number}.epochs" in chosen:
            stages[number] = replace(stages[number], epochs=stage.epochs)
        if f"stages.{number}.lr" in chosen:
            stages[number] = replace(stages[number], lr=stage.lr)
    return replace(config, recipe=earlier.recipe, stages=stages, batch=batch)


def restore(run: Path, config: Config, dataset: Dataset, runtime: Runtime) -> Snapshot | None:
    """The newest whole checkpoint, the same on every rank, if it is of this data and config.

    ``batch.micro`` may be a part of what it was, where memory did not hold that: its state then
    says so, as after a halving within the run.

    Raises:
        UserError: on every rank, naming what differs.
    """
    identity = run_identity(config, dataset)
    micro = int(config.batch.micro)
    found: list[Snapshot] = []

    def find() -> int | None:
        snapshot = load_newest_checkpoint(run)
        if snapshot is None:
            return None
        found.append(snapshot)
        then = snapshot.identity
        if then["config"]["batch"]["micro"] % micro == 0:
            then = copy.deepcopy(then)
            then["config"]["batch"]["micro"] = micro
        refuse_other_identity(run, then, identity)
        return snapshot.state.step

    step = runtime.from_main(find)
    if step is None:
        return None
    snapshot = runtime.on_every_rank(
        lambda: found[0] if found else load_checkpoint_of(run, cast(int, step))
    )
    _note_smaller_microbatch(snapshot, micro)
    return snapshot


def _note_smaller_microbatch(snapshot: Snapshot, micro: int) -> None:
    state = snapshot.state
    before = state.micro_batch_size or snapshot.identity["config"]["batch"]["micro"]
    if micro < before:
        state.micro_batch_size = micro
        state.halvings = [*state.halvings, [state.step, micro]]
        LOG.warning("from step %d on the canonical microbatch is %d", state.step, micro)
