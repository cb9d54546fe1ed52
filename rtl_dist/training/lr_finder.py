"""The learning-rate range test (Smith 2017, arXiv 1506.01186) of one stage.

The stage's own steps are taken at rates that grow from step to step. The loss of a step is counted
exactly over all ranks, so what is measured is the same on every rank and, to rounding, at any
number of them.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from rtl_dist.config import ResolvedStage
from rtl_dist.core.errors import RtlDistError, StopRequested
from rtl_dist.core.files import write_json
from rtl_dist.optim.counts import non_finite, train_metrics
from rtl_dist.records.lr_finder import FOLDER, holds_up_to, smoothed
from rtl_dist.training.run import Run
from rtl_dist.training.solving import solve_head
from rtl_dist.training.stage_trainer import StageTrainer

LOG = logging.getLogger("rtl_dist")
_LOWEST, _HIGHEST = 1e-6, 1.0
STEPS = 80
_HOPELESS = 3.0  # times the lowest loss: the test ends


def measure_rates(stage: ResolvedStage, run: Run) -> float:
    """The rate that the stage's loss ``holds_up_to``; what was measured is written to
    ``lr_finder/<stage>.json``. What the steps did to the model stays.

    Raises:
        StopRequested: on every rank. OutOfMemory: on every rank, memory does not hold a microbatch.
        RtlDistError: a rank's loader failed, or the loss is never a number.
    """
    LOG.info("stage %s: a range test of its learning rate, up to %d steps", stage.name, STEPS)
    # in fp16 some are taken again, as the loss had another scale
    num_steps = STEPS + (stage.optim.skip_limit if run.runtime.precision == "fp16" else 0)
    trainer = StageTrainer(replace(stage, lr=1.0), run, num_steps=num_steps)
    try:
        if stage.solve:
            solve_head(stage, run, trainer)
        rates, losses = _measure(trainer, run, stage, num_steps=num_steps)
    finally:
        trainer.close()
    found = holds_up_to(rates, losses)
    content = {"stage": stage.name, "holds_up_to": found, "rates": rates, "losses": losses}
    run.runtime.from_main(lambda: write_json(run.folder / FOLDER / f"{stage.name}.json", content))
    if found is None:
        raise RtlDistError(f"stage {stage.name}: the loss is a number at no learning rate")
    return found


def _measure(
    trainer: StageTrainer, run: Run, stage: ResolvedStage, *, num_steps: int
) -> tuple[list[float], list[float]]:
    """Rates and the loss of each step before it was taken.

    Args:
        num_steps: the most that are tried.
    """
    runtime = run.runtime
    rates: list[float] = []
    losses: list[float] = []
    trainer.standardize_head()
    growth = math.log(_HIGHEST / _LOWEST) / (STEPS - 1)
    with (
        runtime.heartbeat.phase("looking for a learning rate"),
        runtime.progress(total=STEPS, what=f"lr of {stage.name}", unit="step") as bar,
    ):
        for _ in range(num_steps):
            rate = _LOWEST * math.exp(growth * len(rates))
            outcome = trainer.step(rate)
            stop = outcome.abandoned
            if stop or runtime.agree(bad_samples=0, failure=outcome.failure)[0]:
                raise StopRequested("stopped while looking for a learning rate; start again")
            trainer.accept(outcome)
            counts = trainer.totals.flush(runtime.sum_over_ranks)
            loss = train_metrics(counts, task=run.dataset.task)["train/loss"]
            in_a_row = trainer.skipped.exact()[1]
            finds_scale = trainer.optimizer.scales_loss and in_a_row < stage.optim.skip_limit
            if non_finite(counts) or (in_a_row and not finds_scale):
                break
            if in_a_row:
                continue  # it says nothing of the rate, which is tried again on other images
            rates.append(rate)
            losses.append(loss)
            if smoothed(losses)[-1] > _HOPELESS * min(smoothed(losses)):
                break
            bar.update()
            if len(rates) == STEPS:
                break
    return rates, losses
