"""When things happen: the learning rate and recurring events, as functions of the step.

Everything here is pure, so the whole plan of a run is known before it starts and a resumed run
needs nothing but its step. "Step" always means optimizer step, counted from 0 over the whole run.

One schedule is the exception: under ``plateau`` the rate is a function of the step and of the
evaluations before it. How often it fell is part of ``TrainState``, so that a resumed run goes on
with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from rtl_dist.config import ResolvedStage
from rtl_dist.core.intervals import Every, is_due


def stage_rate_factor(stage: ResolvedStage, step: int, *, lr: float, times_lowered: int) -> float:
    """What a stage's base learning rates are multiplied by at its ``step``-th step (from 0).

    Args:
        lr: of the head, the stage's own or what was found for it.
        times_lowered: how often evaluations so far had the rate fall; of ``plateau`` only, of which
            the rate is a function of this and the step. Of all others it is one of the step alone.
    """
    optim, lowest = stage.optim, 0.0
    if stage.schedule == "step":
        assert optim.step_size is not None  # the config's checks
        after = max(0, step - num_warmup_steps(stage.num_steps, stage.warmup))
        # exact: in floats a fall could come a step late
        falls = after // (Fraction(str(optim.step_size)) * stage.steps_per_epoch)
        factor = optim.gamma**falls
    elif stage.schedule == "plateau":
        factor, lowest = optim.factor**times_lowered, min(1.0, optim.min_lr / lr)
    else:
        factor = 1.0
    shape = learning_rate_factor(
        step, num_steps=stage.num_steps, warmup=stage.warmup, shape=stage.schedule
    )
    return shape * max(factor, lowest)


def learning_rate_factor(step: int, *, num_steps: int, warmup: float, shape: str) -> float:
    """Warm-up, and what follows of it that only the length of the stage determines.

    Args:
        step: in ``[0, num_steps)``.
        warmup: below 1 a fraction of the stage, from 1 a number of steps; linear from near 0.
        shape: ``cosine`` (to 0, Loshchilov & Hutter 2017, arXiv 1608.03983) or ``linear``; all
            others are constant here.
    """
    warmup_steps = num_warmup_steps(num_steps, warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1 - progress
    return 1.0


def num_warmup_steps(num_steps: int, warmup: float) -> int:
    """Of a stage; for ``warmup`` see ``learning_rate_factor``."""
    return min(math.ceil(warmup * num_steps) if warmup < 1 else int(warmup), num_steps)


def falls_at_once(stage: ResolvedStage, step: int) -> bool:
    """Whether ``schedule: step`` lowers the rate between a stage's step before and this one."""
    if stage.schedule != "step":
        return False
    before, now = (
        stage_rate_factor(stage, at, lr=1.0, times_lowered=0) for at in (max(0, step - 1), step)
    )
    return now < before


@dataclass(frozen=True, kw_only=True)
class Due:
    """What is to be done at a step boundary, in this order."""

    log: bool
    """A row of training metrics; an evaluation's row would say all that it says."""
    save: bool
    """A checkpoint; before an evaluation too, as the best weights must not be newer than what a run
    goes on from."""
    evaluate: bool
    """The whole val split."""


def what_is_due(
    state: Progress,
    *,
    at_stage_end: bool,
    log_every: Every,
    save_every: Every,
    eval_every: Every,
    num_samples: int,
    global_batch_size: int,
    rate_falls: bool = False,
) -> Due:
    """What comes due at ``state.step``, from when each thing was done last.

    rate_falls: after this step at once: a row before it shows from where on.
    """

    def came_due(every: Every, last: int) -> bool:
        return is_due(
            state.step,
            every,
            last=last,
            num_samples=num_samples,
            global_batch_size=global_batch_size,
        )

    evaluate = at_stage_end or state.eval_was_due or came_due(eval_every, state.last_eval)
    evaluate = evaluate and state.last_eval != state.step
    return Due(
        log=not evaluate and (rate_falls or came_due(log_every, state.last_log)),
        save=at_stage_end or evaluate or came_due(save_every, state.last_checkpoint),
        evaluate=evaluate,
    )


class Progress(Protocol):
    """When things were done last, in steps; see ``TrainState``."""

    step: int
    last_log: int
    last_eval: int
    last_checkpoint: int
    eval_was_due: bool
