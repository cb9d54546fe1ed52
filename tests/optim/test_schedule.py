"""Recurring events, stage boundaries and the learning rate, as functions of the step."""

import itertools
import math
import tracemalloc
import warnings
from fractions import Fraction

import pytest
import torch

from rtl_dist.config import parse_config
from rtl_dist.config.resolved_stage import StageSpan, resolve_stages, stage_spans
from rtl_dist.core.intervals import Every, is_due
from rtl_dist.optim.schedule import (
    falls_at_once,
    learning_rate_factor,
    stage_rate_factor,
    what_is_due,
)
from rtl_dist.records.state import TrainState

# --- Every ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        ("1 epoch", 1, "epoch"),
        ("0.5 epochs", Fraction(1, 2), "epoch"),
        ("0.1epochs", Fraction(1, 10), "epoch"),
        (" 200  steps ", 200, "step"),
        ("1 step", 1, "step"),
        ("2.0 steps", 2, "step"),
    ],
)
def test_every_reads_a_number_and_a_unit(text, count, unit):
    assert Every.parse(text) == Every(Fraction(count), unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch",
        "1",
        "1 hour",
        "-1 epoch",
        "0 epochs",
        "0 steps",
        "1.5 steps",
        "1e3 steps",
        "1 2",
    ],
)
def test_every_refuses_what_it_does_not_understand(text):
    with pytest.raises(ValueError, match="expected"):
        Every.parse(text)


@pytest.mark.parametrize(
    "text", ["1 epoch", "1 step", "200 steps", "0.5 epochs", "0.00001 epochs", "1000000 steps"]
)
def test_every_is_written_as_it_is_read(text):
    assert str(Every.parse(text)) == text


# --- is_due --------------------------------------------------------------------------------------


def events(text, *, batch, samples, steps):
    """The steps at which an event comes due, asked at every step as the engine does."""
    every, last, due = Every.parse(text), 0, []
    for step in range(1, steps + 1):
        size = {"global_batch_size": batch, "num_samples": samples}
        if is_due(step, every, last=last, **size):
            due.append(step)
            last = step
    return due


@pytest.mark.parametrize("samples", [1, 2, 7, 64, 100, 1281])
@pytest.mark.parametrize("batch", [1, 3, 7, 32, 64, 100])
def test_an_epoch_event_comes_once_an_epoch_whatever_the_sizes(batch, samples):
    epochs = 20
    due = events("1 epoch", batch=batch, samples=samples, steps=epochs * samples // batch)
    if batch <= samples:
        # at the first step by which the epoch's samples have all been seen
        assert due == [math.ceil(e * samples / batch) for e in range(1, epochs)] + (
            [epochs * samples // batch] if epochs * samples % batch == 0 else []
        )
    else:  # a step holds more than an epoch: once a step, never more
        assert due == list(range(1, epochs * samples // batch + 1))


def test_fractions_of_an_epoch_do_not_drift():
    # 1/10 has no finite binary form: with floats some event of a long run comes a step late
    due = events("0.1 epochs", batch=10, samples=1000, steps=10_000)
    assert due == list(range(10, 10_001, 10))


def test_a_step_event_comes_at_multiples():
    assert events("3 steps", batch=5, samples=7, steps=10) == [3, 6, 9]
    assert events("1 step", batch=5, samples=7, steps=3) == [1, 2, 3]


def test_an_event_missed_while_stopped_comes_due_once():
    every, size = Every.parse("2 steps"), {"global_batch_size": 1, "num_samples": 1}
    assert is_due(9, every, last=3, **size)
    assert not is_due(9, every, last=8, **size)
    assert not is_due(3, every, last=3, **size)


def test_events_of_a_huge_data_set_are_exact():
    samples, batch = 10**9 + 7, 4096
    epoch_end = math.ceil(1000 * samples / batch)
    every = Every.parse("1 epoch")
    sizes = {"global_batch_size": batch, "num_samples": samples}
    assert every.events_by(epoch_end - 1, **sizes) == 999
    assert every.events_by(epoch_end, **sizes) == 1000


# --- stage_spans ---------------------------------------------------------------------------------


def spans(lengths, *, samples, batch):
    """lengths: floats are epochs, ints are steps."""
    return stage_spans(
        [n if isinstance(n, float) else None for n in lengths],
        [n if isinstance(n, int) else None for n in lengths],
        num_samples=samples,
        global_batch_size=batch,
    )


@pytest.mark.parametrize("samples", [1, 10, 100, 1281])
@pytest.mark.parametrize("batch", [1, 7, 32, 256])
@pytest.mark.parametrize("lengths", [[3.0, 12.0], [0.5, 2.0, 0.25], [1.0, 5, 1.0], [4, 3], [0.001]])
def test_stages_lie_end_to_end_and_drop_nothing(lengths, batch, samples):
    found = spans(lengths, samples=samples, batch=batch)
    assert found[0].first_step == 0
    for one, other in itertools.pairwise(found):
        assert one.end_step == other.first_step
    seen = Fraction(0)  # samples that must have been seen by the end of the stage
    for span, length in zip(found, lengths, strict=True):
        assert span.num_steps >= 1
        if isinstance(length, int):
            assert span.num_steps == length
            seen = Fraction(span.end_step * batch)
        else:
            seen += Fraction(str(length)) * samples
            assert span.end_step * batch >= seen
            # and not a batch more, but for a stage too short for one
            assert (span.end_step - 1) * batch < seen or span.num_steps == 1


def test_a_stage_in_epochs_ends_with_the_first_batch_by_which_all_was_seen():
    # 10 samples in batches of 4: epochs end within steps 3 (of 12) and 5 (of 20)
    assert spans([1.0, 1.0], samples=10, batch=4) == [StageSpan(0, 3), StageSpan(3, 5)]
    # what the first stage took of the next epoch counts for the next
    assert sum(span.num_steps for span in spans([1.0] * 10, samples=10, batch=4)) == 25


def test_epochs_after_steps_count_from_where_the_steps_ended():
    assert spans([5, 1.0], samples=10, batch=4) == [StageSpan(0, 5), StageSpan(5, 8)]


def test_decimal_epochs_are_exact():
    # in binary 0.1 + 0.2 is more than 0.3, which would be a step too many
    assert spans([0.1, 0.2], samples=1000, batch=100)[-1].end_step == 3


def test_huge_data_sets_need_no_more_than_arithmetic():
    tracemalloc.start()
    (span,) = spans([90.0], samples=10**12, batch=1024)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert span.end_step == math.ceil(90 * 10**12 / 1024)
    assert used < 100_000


# --- learning_rate_factor ------------------------------------------------------------------------


def curve(num_steps, warmup, shape):
    return [
        learning_rate_factor(step, num_steps=num_steps, warmup=warmup, shape=shape)
        for step in range(num_steps)
    ]


@pytest.mark.parametrize("num_steps", [2, 3, 10, 101])
def test_cosine_is_that_of_torch(num_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    theirs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule stepped without an optimizer step
        for _ in range(num_steps):
            theirs.append(optimizer.param_groups[0]["lr"])
            schedule.step()
    assert curve(num_steps, 0.0, "cosine") == pytest.approx(theirs, abs=1e-12)


def test_cosine_and_linear_end_near_zero():
    assert 0 < curve(1000, 0.05, "cosine")[-1] < 1e-5
    assert 0 < curve(1000, 0.05, "linear")[-1] < 2e-3


def test_warm_up_rises_in_equal_steps_to_the_full_rate():
    assert curve(100, 0.05, "constant") == [0.2, 0.4, 0.6, 0.8, 1.0, *[1.0] * 95]
    assert curve(100, 4, "constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert curve(100, 1.0, "constant") == [1.0] * 100  # from 1 on, a number of steps
    # what follows warm-up is the whole shape over the remaining steps
    assert curve(100, 10, "cosine")[10:] == curve(90, 0, "cosine")
    assert curve(100, 10, "linear")[10:] == curve(90, 0, "linear")


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.05, 0.999, 1, 3, 1000])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_the_factor_is_positive_and_at_most_1(shape, warmup, num_steps):
    factors = curve(num_steps, warmup, shape)
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_the_factor_depends_on_the_step_alone():
    steps = [7, 3, 99, 0, 7]
    asked = [
        learning_rate_factor(step, num_steps=100, warmup=0.1, shape="cosine") for step in steps
    ]
    assert asked == [curve(100, 0.1, "cosine")[step] for step in steps]


# --- schedules with keys of their own -------------------------------------------------------------


def stage_of(optim, *, num_samples=100, batch=10, steps=60, lr=1.0):
    stage = {"name": "a", "steps": steps, "lr": lr, "optim": optim}
    tree = {"data": {"path": "d"}, "stages": [stage], "batch": {"global": batch}}
    return resolve_stages(parse_config(tree), num_samples=num_samples)[0]


def factors(stage, times_lowered=0):
    return [
        stage_rate_factor(stage, step, lr=0.5, times_lowered=times_lowered)
        for step in range(stage.num_steps)
    ]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("size", [1, 2])
def test_step_is_torch_s_step_lr(size, warmup):
    """Stepped once an epoch of 10 steps, after a warm-up in steps."""
    optim = {"schedule": "step", "step_size": size, "gamma": 0.5, "warmup": warmup}
    stage = stage_of(optim, steps=60 + warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=size, gamma=0.5)
    theirs = []
    for _ in range(6):
        theirs += [optimizer.param_groups[0]["lr"]] * 10
        optimizer.step()
        schedule.step()
    found = factors(stage)
    assert found[warmup:] == theirs
    assert found[:warmup] == [(step + 1) / warmup for step in range(warmup)]


def test_a_fall_comes_with_the_first_step_after_its_samples_were_seen():
    # 10 samples in batches of 4: 2.5 steps an epoch; of three epochs 7.5
    stage = stage_of({"schedule": "step", "step_size": 3, "warmup": 0}, num_samples=10, batch=4)
    assert [step for step in range(60) if falls_at_once(stage, step)][:3] == [8, 15, 23]
    # a tenth of an epoch has no finite binary form
    stage = stage_of({"schedule": "step", "step_size": 0.1, "warmup": 0}, num_samples=1000)
    assert [step for step in range(60) if falls_at_once(stage, step)] == [10, 20, 30, 40, 50]


def test_no_other_schedule_falls_at_once():
    for name in ("cosine", "linear", "constant", "plateau"):
        stage = stage_of({"schedule": name, "step_size": 1})
        assert not any(falls_at_once(stage, step) for step in range(60))


def test_a_plateau_lowers_all_after_warm_up_to_a_floor():
    stage = stage_of({"schedule": "plateau", "factor": 0.1, "min_lr": 0.02, "warmup": 5})
    assert factors(stage) == [0.2, 0.4, 0.6, 0.8, *[1.0] * 56]
    assert set(factors(stage, times_lowered=1)[5:]) == {0.1}
    assert set(factors(stage, times_lowered=2)[5:]) == {0.04}  # 0.02 of a rate of 0.5
    # a rate that was found may be below the floor: it is no reason to raise it
    assert stage_rate_factor(stage, 50, lr=1e-3, times_lowered=2) == 1.0


# --- what is due ---------------------------------------------------------------------------------


def due_at(step: int, *, at_stage_end: bool = False, **last: object) -> tuple[bool, bool, bool]:
    """(log, save, evaluate) where rows come every 2, checkpoints every 3, evaluations every 4."""
    state = TrainState(step=step, **last)
    due = what_is_due(
        state,
        at_stage_end=at_stage_end,
        log_every=Every.parse("2 steps"),
        save_every=Every.parse("3 steps"),
        eval_every=Every.parse("4 steps"),
        num_samples=100,
        global_batch_size=10,
    )
    return due.log, due.save, due.evaluate


def test_each_thing_comes_due_by_its_own_interval():
    assert due_at(1) == (False, False, False)
    assert due_at(2) == (True, False, False)
    assert due_at(3, last_log=2) == (False, True, False)
    assert due_at(5, last_log=4, last_eval=4, last_checkpoint=4) == (False, False, False)


def test_an_evaluation_is_saved_before_and_says_all_that_a_row_would():
    assert due_at(4, last_log=2, last_checkpoint=3) == (False, True, True)


def test_a_stage_s_end_is_saved_and_evaluated_but_once():
    assert due_at(1, at_stage_end=True) == (False, True, True)
    assert due_at(1, at_stage_end=True, last_eval=1) == (False, True, False)


def test_a_row_shows_from_where_on_the_rate_falls():
    sizes = {"num_samples": 100, "global_batch_size": 10}
    every = dict.fromkeys(("log_every", "save_every", "eval_every"), Every.parse("9 steps"))
    due = what_is_due(TrainState(step=1), at_stage_end=False, rate_falls=True, **every, **sizes)
    assert (due.log, due.save, due.evaluate) == (True, False, False)


def test_an_evaluation_that_was_to_come_is_made_up_for():
    assert due_at(5, last_eval=4, last_log=4, last_checkpoint=5, eval_was_due=True)[2]
    assert not due_at(5, last_eval=5, last_log=5, last_checkpoint=5, eval_was_due=True)[2]
