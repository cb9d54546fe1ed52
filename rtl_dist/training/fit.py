"""Training one stage to its end."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

from rtl_dist.config import ResolvedStage
from rtl_dist.core.errors import OutOfMemory, UserError
from rtl_dist.model.freezing import batchnorm_learns
from rtl_dist.records.checkpoint import Snapshot
from rtl_dist.training.run import Run
from rtl_dist.training.solving import solve_head
from rtl_dist.training.stage_optimizer import OptimizerState
from rtl_dist.training.stage_trainer import StageTrainer
from rtl_dist.training.step_boundary import StepBoundary

LOG = logging.getLogger("rtl_dist")


def fit(stage: ResolvedStage, run: Run, restored: Snapshot | None) -> None:
    """Trains one stage, from where ``run.state`` stands to its end.

    Args:
        restored: the checkpoint to go on from, if it lies within this stage.

    Raises:
        StopRequested: every rank agreed to stop; a checkpoint was saved.
        DataError: more damaged samples than ``data.bad_samples``.
        UserError: memory does not hold the smallest microbatch.
        RtlDistError: the loss is no longer finite, or a rank's loader failed.
    """
    run.runtime.heartbeat.beat(stage=stage.name, step=run.state.step)
    kept = OptimizerState(restored.optimizer, restored.scaler) if restored else None
    again: _Again | None = _Again(kept)
    with run.runtime.heartbeat.phase("training"):
        while again is not None:
            again = _train(stage, run, again.kept)
    if run.stage_best and stage.patience is not None:
        assert run.state.stage_best is not None
        LOG.info("stage %s: back to its best, of step %d", stage.name, run.state.stage_best.step)
        run.go_back_to_stage_best()
    run.stage_best = {}
    for model in run.models():
        model.head.fold()
    run.state.begin_next_stage()


@dataclass(frozen=True)
class _Again:
    """The stage goes on, with a trainer of its own."""

    kept: OptimizerState | None
    """What the optimizer knows, on the host; None: it has not begun."""


def _train(stage: ResolvedStage, run: Run, kept: OptimizerState | None) -> _Again | None:
    """Trains to the stage's end, or until memory does not hold a microbatch, wherever one is
    computed: then what it was made smaller for is all that is left of this attempt."""
    opened_at = time.perf_counter()
    trainer = None
    try:
        trainer = StageTrainer(stage, run, kept)
        _take_steps(stage, run, trainer, is_new=kept is None, opened_at=opened_at)
    except OutOfMemory as error:
        _halve_microbatch(run, error)
        if trainer is None:
            return _Again(kept)
        trainer.fold_totals()
        return _Again(trainer.optimizer.state().on_host())
    finally:
        if failed := sys.exception():
            run.runtime.let_go(failed)  # or closing would wait for a rank that is gone
        if trainer is not None:
            trainer.close()
    return None


def _take_steps(
    stage: ResolvedStage, run: Run, trainer: StageTrainer, *, is_new: bool, opened_at: float
) -> None:
    """From where the stage stands to its end.

    Args:
        is_new: no step was taken in it yet, nor its head solved.
        opened_at: ``time.perf_counter()`` when work on it began.

    Raises:
        OutOfMemory: on every rank, if the memory of one does not hold a microbatch.
    """
    boundary = StepBoundary(stage, run, trainer, opened_at=opened_at)
    LOG.info("stage %s: %s", stage.name, trainer.describe())
    # a checkpoint within the stage was saved with the solved head
    if stage.solve and is_new and run.state.step == run.state.stage_first_step:
        boundary.count_bad(solve_head(stage, run, trainer))
    boundary.begin()
    trainer.standardize_head()
    with run.runtime.progress(
        total=stage.num_steps,
        done=run.state.step - run.state.stage_first_step,
        what=stage.name,
        unit="step",
        images=run.config.batch.total,
    ) as bar:
        while not boundary.at_stage_end:
            boundary.cross(trainer.step())
            bar.update()


def _halve_microbatch(run: Run, error: OutOfMemory) -> None:
    """Keeps the global batch, in more and smaller microbatches."""
    if run.config.batch.sync_batchnorm and run.runtime.world_size > 1:
        raise UserError(
            f"{error}: batch.sync_batchnorm takes one microbatch a process, which cannot be made"
            " smaller; use more processes, a smaller model or data.image_size, or set it to false"
        )
    size = run.micro_batch_size
    smaller = next((size // n for n in range(2, size + 1) if size % n == 0), 0)
    # BatchNorm cannot learn from one image: neither now nor in a stage that comes
    learns = any(batchnorm_learns(run.model, stage) for stage in run.config.stages)
    least = 2 if learns else 1
    if smaller < least:
        raise UserError(
            f"{error}: batch.micro cannot be made smaller; use a smaller model or data.image_size"
        )
    run.state.micro_batch_size = smaller
    run.state.halvings = [*run.state.halvings, [run.state.step, smaller]]
    LOG.warning(
        "%s: from step %d on the canonical microbatch is %d, the global batch is still %d",
        error,
        run.state.step,
        smaller,
        run.config.batch.total,
    )
