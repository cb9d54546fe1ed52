"""When things happen: learning rate, stage boundaries and recurring events, as functions of
the step.

Everything here is pure, so the whole plan of a run is known before it starts and a resumed run
needs nothing but its step. "Step" always means optimizer step, counted from 0 over the whole run.
"""

from __future__ import annotations

import math


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
