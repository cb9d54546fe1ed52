"""Which of two evaluations is better, and when a stage has seen enough of them; pure."""

from __future__ import annotations

from dataclasses import dataclass

from rtl_dist.core.tasks import METRICS
from rtl_dist.records.state import Best


@dataclass(frozen=True, kw_only=True)
class StageJudgement:
    """What an evaluation means for its stage."""

    best: Best
    """The stage's best evaluation, this one included."""
    evals_without_best: int
    """Evaluations since the metric was better than ever before."""
    ends_stage: bool
    """The stage's patience is used up."""


def judge_rate(*, gained: bool, evals_at_rate: int, patience: int) -> tuple[bool, int]:
    """Whether an evaluation has ``schedule: plateau`` lower the rate, and ``evals_at_rate`` then:
    torch's ReduceLROnPlateau with a threshold and a cooldown of 0.

    Args:
        gained: the metric was better than ever before in the stage.
        evals_at_rate: before this one, those since one that gained, or since the rate fell.
        patience: so many without a gain are let pass.
    """
    count = 0 if gained else evals_at_rate + 1
    return (True, 0) if count > patience else (False, count)


def is_better(found: Best, best: Best | None) -> bool:
    """A better metric, or an equal one (small splits have many ties) at a lower loss."""
    if best is None or best.metric != found.metric:
        return True
    sign = -1 if METRICS[found.metric.removeprefix("val/")].is_lower_better else 1
    return (sign * found.value, -found.loss) > (sign * best.value, -best.loss)


def judge_stage(
    found: Best, best: Best | None, *, evals_without_best: int, patience: int | None
) -> StageJudgement:
    """Judges an evaluation by the best of its stage so far.

    Args:
        evals_without_best: before this evaluation.
        patience: evaluations without a better one after which the stage ends; None: it does not.
    """
    leads = is_better(found, best)
    # an equal metric at a lower loss is the better one, and no reason to go on
    gained = best is None or (leads and best.value != found.value)
    count = 0 if gained else evals_without_best + 1
    return StageJudgement(
        best=found if leads or best is None else best,
        evals_without_best=count,
        ends_stage=patience is not None and count >= patience,
    )
