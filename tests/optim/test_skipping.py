"""Steps that are not taken, counted."""

import pytest
import torch

from rtl_dist.optim.skipped import SkippedSteps

CPU = torch.device("cpu")


def after(taken: list[bool], **start: int) -> SkippedSteps:
    skipped = SkippedSteps(CPU, **({"total": 0, "in_a_row": 0} | start))
    for one in taken:
        skipped.note(torch.tensor(one))
    return skipped


@pytest.mark.parametrize(
    ("taken", "total", "in_a_row"),
    [
        ([], 0, 0),
        ([True, True], 0, 0),
        ([False], 1, 1),
        ([False, False, True], 2, 0),
        ([False, False, True, False], 3, 1),
        ([True, False, False, False], 3, 3),
    ],
)
def test_they_are_counted_in_all_and_up_to_the_last_step(taken, total, in_a_row):
    skipped = after(taken)
    assert skipped.exact() == (total, in_a_row)
    assert skipped.in_a_row == in_a_row


def test_what_a_run_skipped_before_it_was_resumed_counts():
    assert after([], total=7, in_a_row=2).exact() == (7, 2)
    assert after([], total=7, in_a_row=2).in_a_row == 2
    assert after([False], total=7, in_a_row=2).exact() == (8, 3)
    taken = after([True], total=7, in_a_row=2)
    assert (taken.exact(), taken.in_a_row) == ((7, 0), 0)


def test_on_a_cpu_the_count_is_known_after_each_step():
    skipped = after([])
    seen = []
    for taken in (False, False, True, False, True, False, False):
        skipped.note(torch.tensor(taken))
        seen.append(skipped.in_a_row)
    assert seen == [1, 2, 0, 1, 0, 1, 2]


@pytest.mark.gpu
def test_on_a_gpu_it_is_known_one_step_later():
    device = torch.device("cuda")
    skipped = SkippedSteps(device, total=0, in_a_row=0)
    seen = []
    for taken in (False, False, True, False):
        skipped.note(torch.tensor(taken, device=device))
        seen.append(skipped.in_a_row)
    assert seen == [0, 1, 2, 0]
    assert skipped.exact() == (3, 1)
