"""Training one stage to its end."""

from __future__ import annotations

import logging
import time

from rtl_dist.config import Stage
from rtl_dist.core.errors import OutOfMemory, UserError
from rtl_dist.model.batchnorm import learning_layers
from rtl_dist.optim.schedule import StageSpan
from rtl_dist.records.checkpoint import Snapshot
from rtl_dist.training.lr_finder import find_learning_rate
from rtl_dist.training.run import Job
from rtl_dist.training.stage_trainer import OptimizerState, StageTrainer
from rtl_dist.training.step_boundary import Boundary

LOG = logging.getLogger("rtl_dist")


def fit(stage: Stage, span: StageSpan, job: Job, restored: Snapshot | None) -> None:
    """Trains one stage, from where ``job.state`` stands to its end.

    Args:
        restored: the checkpoint to go on from, if it lies within this stage.

    Raises:
        StopRequested: every rank agreed to stop; a checkpoint was saved.
        DataError: more damaged samples than ``data.bad_samples``.
        UserError: memory does not hold the smallest microbatch.
        RtlDistError: the loss is no longer finite, or a rank's loader failed.
    """
    opened_at = time.perf_counter()
    job.runtime.heartbeat.beat(stage=stage.name, step=job.state.step)
    lr = stage.lr if stage.lr != "auto" else job.state.lr
    while lr is None:
        try:
            lr = job.state.lr = find_learning_rate(stage, span, job)
        except OutOfMemory as error:
            _halve_microbatch(job, error)
    kept = OptimizerState(restored.optimizer, restored.scaler) if restored else None
    with job.runtime.heartbeat.phase("training"):
        while (kept := _train(stage, span, job, kept, lr=lr, opened_at=opened_at)) is not None:
            opened_at = time.perf_counter()
    if job.stage_best and job.config.patience_of(stage) is not None:
        assert job.state.stage_best is not None
        LOG.info("stage %s: back to its best, of step %d", stage.name, job.state.stage_best.step)
        job.go_back_to_stage_best()
    job.stage_best = {}
    job.state.begin_next_stage()


def _train(
    stage: Stage,
    span: StageSpan,
    job: Job,
    kept: OptimizerState | None,
    *,
    lr: float,
    opened_at: float,
) -> OptimizerState | None:
    """Trains to the stage's end, or until memory does not hold a microbatch: then returns what the
    optimizer knows, on the host, to go on with smaller ones. Nothing else is left of this attempt.
    """
    trainer = StageTrainer(stage, span, job, kept, lr=lr)
    try:
        boundary = Boundary(stage, span, job, trainer, opened_at=opened_at)
        LOG.info("stage %s: %s", stage.name, trainer.describe())
        boundary.evaluate_if_due()
        done = job.state.step - job.state.stage_first_step
        with job.runtime.progress(
            total=span.num_steps, done=done, what=stage.name, unit="step"
        ) as bar:
            while not boundary.at_stage_end:
                trainer.step()
                try:
                    boundary.cross()
                except OutOfMemory as error:
                    boundary.fold_totals()
                    _halve_microbatch(job, error)
                    return trainer.optimizer_state().on_host()
                bar.update()
    finally:
        trainer.close()
    return None


def _halve_microbatch(job: Job, error: OutOfMemory) -> None:
    """Keeps the global batch, in more and smaller microbatches."""
    size = job.micro_batch_size
    smaller = next((size // n for n in range(2, size + 1) if size % n == 0), 0)
    least = 2 if learning_layers(job.model) else 1  # BatchNorm learns nothing from one image
    if smaller < least:
        raise UserError(
            f"{error}: batch.micro cannot be made smaller; use a smaller model or data.image_size"
        )
    job.state.micro_batch_size = smaller
    job.state.halvings = [*job.state.halvings, [job.state.step, smaller]]
    LOG.warning(
        "%s: from step %d on the canonical microbatch is %d, the global batch is still %d",
        error,
        job.state.step,
        smaller,
        job.config.batch.global_,
    )
