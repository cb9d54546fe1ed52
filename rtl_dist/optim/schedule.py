"""When things happen: the learning rate and recurring events, as functions of the step.

Everything here is pure, so the whole plan of a run is known before it starts and a resumed run
needs nothing but its step. "Step" always means optimizer step, counted from 0 over the whole run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rtl_dist.core.intervals import Every, is_due


def learning_rate_factor(step: int, *, num_steps: int, warmup: float, shape: str) -> float:
    """What a stage's base learning rates are multiplied by at its ``step``-th step (from 0).

    Args:
        step: in ``[0, num_steps)``.
        warmup: below 1 a fraction of the stage, from 1 a number of steps; linear from near 0.
        shape: ``cosine`` (to 0, Loshchilov & Hutter 2017, arXiv 1608.03983), ``linear`` or
            ``constant``.
    """
    warmup_steps = min(math.ceil(warmup * num_steps) if warmup < 1 else int(warmup), num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1 - progress
    return 1.0


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
) -> Due:
    """What comes due at ``state.step``, from when each thing was done last."""

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
        log=not evaluate and came_due(log_every, state.last_log),
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
