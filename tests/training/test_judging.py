"""Which of two evaluations is better, and when a stage has seen enough of them."""

import pytest
import torch

from rtl_dist.records.state import Best
from rtl_dist.training.judging import is_better, judge_rate, judge_stage


def best(value: float, *, loss: float = 1.0, metric: str = "val/top1") -> Best:
    return Best(value=value, metric=metric, loss=loss, step=1, epoch=1.0, stage="head")


@pytest.mark.parametrize(
    ("found", "before", "expected"),
    [
        (best(0.5), None, True),
        (best(0.6), best(0.5), True),
        (best(0.4), best(0.5), False),
        (best(0.5, loss=0.9), best(0.5), True),  # a tie of a small split
        (best(0.5, loss=1.0), best(0.5), False),
        (best(0.5, loss=2.0), best(0.4, loss=0.1), True),  # the metric comes first
        (best(0.4, metric="val/loss"), best(0.5, metric="val/loss"), True),  # lower is better
        (best(0.6, metric="val/loss"), best(0.5, metric="val/loss"), False),
        (best(0.1, metric="val/map"), best(0.9), True),  # not to be compared: the config changed
    ],
)
def test_the_better_of_two(found, before, expected):
    assert is_better(found, before) is expected


def patience_over(values: list[tuple[float, float]], patience: int | None) -> tuple[list[int], int]:
    """(how many evaluations brought nothing better, after each; after which one the stage ends, 0
    if it does not) of evaluations with these metrics and losses."""
    kept, count, counts = None, 0, []
    for number, (value, loss) in enumerate(values, start=1):
        judgement = judge_stage(
            best(value, loss=loss), kept, evals_without_best=count, patience=patience
        )
        kept, count = judgement.best, judgement.evals_without_best
        counts.append(count)
        if judgement.ends_stage:
            return counts, number
    return counts, 0


def test_patience_counts_evaluations_without_a_better_metric():
    values = [(0.5, 1.0), (0.6, 1.0), (0.6, 1.0), (0.5, 0.1), (0.7, 1.0), (0.6, 1.0)]
    assert patience_over(values, patience=3) == ([0, 0, 1, 2, 0, 1], 0)
    assert patience_over(values, patience=2) == ([0, 0, 1, 2], 4)
    assert patience_over(values, patience=None) == ([0, 0, 1, 2, 0, 1], 0)


def test_an_equal_metric_at_a_lower_loss_is_the_best_and_no_reason_to_go_on():
    judgement = judge_stage(
        best(0.5, loss=0.5), best(0.5, loss=1.0), evals_without_best=1, patience=2
    )
    assert judgement.best.loss == 0.5
    assert judgement.evals_without_best == 2
    assert judgement.ends_stage


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize(("metric", "mode"), [("val/top1", "max"), ("val/loss", "min")])
def test_the_rate_falls_where_that_of_torch_does(metric, mode, patience):
    generator = torch.Generator().manual_seed(patience)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.5, patience=patience, threshold=0, eps=0
    )
    kept, count, at_rate, lowered = None, 0, 0, 0
    for value in torch.randint(0, 12, (60,), generator=generator).div(12).tolist():
        judgement = judge_stage(
            best(value, metric=metric), kept, evals_without_best=count, patience=None
        )
        kept, count = judgement.best, judgement.evals_without_best
        falls, at_rate = judge_rate(gained=count == 0, evals_at_rate=at_rate, patience=patience)
        lowered += falls
        schedule.step(value)
        assert 0.5**lowered == optimizer.param_groups[0]["lr"]
    assert lowered > 5
