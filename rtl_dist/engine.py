"""Training one stage to its end."""

from __future__ import annotations

import time

from rtl_dist.boundary import Boundary
from rtl_dist.checkpoint import Snapshot
from rtl_dist.config import Stage
from rtl_dist.job import Job
from rtl_dist.schedule import StageSpan
from rtl_dist.stage_trainer import StageTrainer


def fit(stage: Stage, span: StageSpan, job: Job, restored: Snapshot | None) -> None:
    """Trains one stage, from where ``job.state`` stands to its end.

    Args:
        restored: the checkpoint to go on from, if it lies within this stage.

    Raises:
        StopRequested: every rank agreed to stop; a checkpoint was saved.
        DataError: more damaged samples than ``data.bad_samples``.
        RtlDistError: the loss is no longer finite.
    """
    state, opened_at = job.state, time.perf_counter()
    trainer = StageTrainer(stage, span, job, restored)
    try:
        boundary = Boundary(stage, span, job, trainer, opened_at=opened_at)
        boundary.evaluate_if_due()
        done = state.step - state.stage_first_step
        with job.runtime.progress(
            total=span.num_steps, done=done, what=stage.name, unit="step"
        ) as bar:
            while not boundary.at_stage_end:
                trainer.step()
                boundary.cross()
                bar.update()
    finally:
        trainer.close()
    state.stage += 1
    state.stage_first_step = state.step
    state.evals_without_best = 0
    state.stopped_early = False
