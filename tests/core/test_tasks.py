"""What is named of each task holds together."""

import json

import pytest

from rtl_dist.core.tasks import METRICS, MULTI_LABEL, SINGLE_LABEL, Task


@pytest.mark.parametrize("task", list(Task))
def test_every_metric_that_a_task_names_is_one(task):
    assert set(task.metrics) <= METRICS.keys()
    assert {task.headline, task.counted, task.share_right, *task.shown} <= set(task.metrics)
    assert task.headline == task.metrics[0]
    assert METRICS[task.share_right].is_share
    assert "loss" in task.metrics, "it decides between equal ones"


def test_a_loss_is_better_lower_and_a_headline_higher():
    assert METRICS["loss"].is_lower_better
    assert not any(METRICS[task.headline].is_lower_better for task in Task)


def test_files_say_what_they_always_said():
    assert json.dumps(list(Task)) == '["single_label", "multi_label"]'
    assert f"{SINGLE_LABEL} {MULTI_LABEL}" == "single_label multi_label"
    assert Task("multi_label") is MULTI_LABEL
    assert (SINGLE_LABEL.headline, SINGLE_LABEL.counted) == ("top1", "top1")
    assert (MULTI_LABEL.headline, MULTI_LABEL.counted) == ("map", "micro_f1")
    assert SINGLE_LABEL.shown == ("top1", "macro_f1", "loss")
    assert MULTI_LABEL.shown == ("map", "micro_f1", "loss")
