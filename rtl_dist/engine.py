"""Training one stage to its end."""

from __future__ import annotations

import logging
import time

from rtl_dist.boundary import Boundary
from rtl_dist.checkpoint import Snapshot
from rtl_dist.config import Stage
from rtl_dist.ema import learning_statistics
from rtl_dist.errors import OutOfMemory, UserError
from rtl_dist.job import Job
from rtl_dist.lr_finder import find_learning_rate
from rtl_dist.schedule import StageSpan
from rtl_dist.stage_trainer import OptimizerState, StageTrainer

LOG = logging.getLogger("rtl_dist")


def fit(stage: Stage, span: StageSpan, job: Job, restored: Snapshot | None) -> None:
    """Trains one stage, from where ``job.state`` stands to its end.

    Args:
        restored: the checkpoint to go on from, if it lies within this stage.

    Raises:
        StopRequested: every rank agreed to stop; a checkpoint was saved.
        DataError: more damaged samples than ``data.bad_samples``.
        RtlDistError: the loss is no longer finite, or memory does not hold a single image.
    """
    opened_at = time.perf_counter()
    lr = stage.lr if stage.lr != "auto" else job.state.lr
    while lr is None:
        try:
            lr = job.state.lr = find_learning_rate(stage, span, job)
        except OutOfMemory as error:
            _halve_microbatch(job, error)
    kept = OptimizerState(restored.optimizer, restored.scaler) if restored else None
    halved = False
    while True:
        trainer = StageTrainer(stage, span, job, kept, lr=lr)
        try:
            boundary = Boundary(stage, span, job, trainer, opened_at=opened_at)
            if halved:
                boundary.save()  # what the steps to come are made of is another from here on
            else:
                LOG.info("stage %s: %s", stage.name, trainer.describe())
            _train_to_end(trainer, boundary, job, stage, span)
            break
        except OutOfMemory as error:
            kept, halved, opened_at = trainer.optimizer_state(), True, time.perf_counter()
            _halve_microbatch(job, error)
        finally:
            trainer.close()
    if job.stage_best:
        assert job.state.stage_best is not None
        LOG.info("stage %s: back to its best, of step %d", stage.name, job.state.stage_best.step)
        job.go_back_to_stage_best()
    job.state.begin_next_stage()


def _train_to_end(
    trainer: StageTrainer, boundary: Boundary, job: Job, stage: Stage, span: StageSpan
) -> None:
    boundary.evaluate_if_due()
    done = job.state.step - job.state.stage_first_step
    with job.runtime.progress(total=span.num_steps, done=done, what=stage.name, unit="step") as bar:
        while not boundary.at_stage_end:
            trainer.step()
            boundary.cross()
            bar.update()


def _halve_microbatch(job: Job, error: OutOfMemory) -> None:
    """Keeps the global batch, in more and smaller microbatches."""
    size = job.micro_batch_size
    smaller = next((size // n for n in range(2, size + 1) if size % n == 0), 0)
    least = 2 if learning_statistics(job.model) else 1  # BatchNorm learns nothing from one image
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
