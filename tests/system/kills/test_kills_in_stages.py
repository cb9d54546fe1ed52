"""Killed where stages end and begin, in stages that judge for themselves, in an evaluation and at the
very end, and started again, a run ends with the bytes of one that was never disturbed.
"""

import json
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import Kill, require_done, require_killed, run_ranks
from kills import (
    CROSS,
    EVALUATE,
    SAVE,
    STAGE_ENDS,
    TRAINER,
    gone_on,
    killed,
    place_of,
    shown,
)
from tiny_runs import require_equal_runs, results, tiny_config, write_config

from rtl_dist.evaluation.logits import logits_from_images, logits_from_view
from rtl_dist.model.folder import load_model, write_calibration
from rtl_dist.model.freezing import freeze_for
from rtl_dist.records.state import TrainState
from rtl_dist.report.evaluation import write_evaluation
from rtl_dist.report.run import draw_run
from rtl_dist.training.finish import finish
from rtl_dist.training.run import Run
from rtl_dist.training.solving import solve_head

pytestmark = pytest.mark.launch

# --- where a stage ends and the next begins --------------------------------------------------------

AT_A_STAGE_END = [
    Kill(place=place, call=call, rank=rank, after=after)
    for rank in (0, 1)
    for place, call, after in (
        (CROSS, STAGE_ENDS[0], False),  # the last step is taken
        (EVALUATE, 2, False),  # and its checkpoint asked for; the first one was in mid-stage
        (EVALUATE, 2, True),
        (CROSS, STAGE_ENDS[0], True),
        (TrainState.begin_next_stage, 1, False),
        (TrainState.begin_next_stage, 1, True),
        (TRAINER, 2, False),
        (freeze_for, 2, True),
        (TRAINER, 2, True),
        (CROSS, STAGE_ENDS[1], False),
        (CROSS, STAGE_ENDS[1], True),
        (TRAINER, 3, True),
        (finish, 1, False),
    )
]


@pytest.mark.parametrize(
    "fault", one_of_each([one for one in AT_A_STAGE_END if one.rank == 0], place_of, shown)
)
def test_killed_between_two_stages(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize("fault", one_of_each(AT_A_STAGE_END, lambda fault: fault.rank, shown))
def test_one_of_two_ranks_killed_between_two_stages(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


@pytest.mark.parametrize(
    "fault",
    one_of_each(
        [Kill(place=SAVE, call=call, after=after) for call in (3, 6, 9) for after in (False, True)],
        place_of,
        shown,
    ),
)
def test_killed_as_a_checkpoint_is_written(tmp_path, config, undisturbed, fault):
    """These are of the ends of the three stages."""
    run = tmp_path / "run"
    killed(config, run, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize("after", one_of_each([False, True], name=["before", "after"].__getitem__))
def test_the_first_of_two_ranks_killed_as_a_checkpoint_is_written(
    tmp_path, config, undisturbed, after
):
    run = tmp_path / "run"
    killed(config, run, Kill(place=SAVE, call=3, after=after), world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


# --- in stages that solve their head, go back to their best weights and end early ------------------


@pytest.fixture(scope="module")
def eventful(dataset, tmp_path_factory) -> tuple[str, Path]:
    """A config, and its run undisturbed."""
    stages = [
        {"name": "solved", "steps": 5, "trainable": "head", "solve": True, "views": 2},
        {"name": "wild", "steps": 40, "trainable": ["layer3", "head"], "lr": 0.3,
         "early_stop": {"patience": 2}},
        {"name": "still", "steps": 40, "trainable": "all", "lr": 1e-9,
         "early_stop": {"patience": 1}},
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("eventful")
    changes = {"stages": stages, "optim": {"ema": 0.5}, "run__ledger": True}
    changes |= {"eval__every": "2 steps", "checkpoint__every": "3 steps"}
    content = tiny_config(dataset, folder / "nowhere", **changes)
    config, run = write_config(folder / "c.yaml", content), folder / "run"
    exits = run_ranks(config, f"run.dir={run}")
    require_done(exits)
    assert exits[0].output.count("ends early") == 2
    assert exits[0].output.count("back to its best") == 2
    return config, run


def shown_together(faults: list[Kill]) -> str:
    return ", ".join(shown(fault) for fault in faults)


@pytest.mark.parametrize(
    "faults",
    one_of_each(
        [
            [Kill(place=solve_head)],
            [Kill(place=solve_head, after=True)],
            [Kill(place=CROSS, call=1, after=True), Kill(place=CROSS, call=5, after=True)],
            [Kill(place=Run.keep_as_stage_best, call=2, after=True)],
            [Kill(place=Run.go_back_to_stage_best)],
            [Kill(place=Run.go_back_to_stage_best, after=True)],
            [Kill(place=Run.go_back_to_stage_best, call=2)],
            [Kill(place=finish)],
        ],
        lambda faults: place_of(faults[0]),
        shown_together,
    ),
)
def test_killed_in_stages_that_judge_for_themselves(tmp_path, eventful, faults):
    config, undisturbed = eventful
    run = tmp_path / "run"
    killed(config, run, *faults)
    gone_on(config, run)
    require_equal_runs(undisturbed, run)


# --- in an evaluation --------------------------------------------------------------------------

IN_AN_EVALUATION = [
    Kill(place=blocks, call=call, item=item, rank=rank)
    for rank, items in ((0, (1, 2)), (1, (1,)))  # of three blocks of images rank 1 has the second
    for blocks in (logits_from_view, logits_from_images)  # in partly frozen stages; in the last
    for call in (1, 2)
    for item in items
]


@pytest.mark.parametrize(
    "fault",
    one_of_each(
        [one for one in IN_AN_EVALUATION if one.rank == 0],
        place_of,
        shown,
    ),
)
def test_killed_in_an_evaluation(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize("fault", one_of_each(IN_AN_EVALUATION, lambda fault: fault.rank, shown))
def test_one_of_two_ranks_killed_in_an_evaluation(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


# --- at the very end ---------------------------------------------------------------------------


@pytest.mark.parametrize("after", one_of_each([False, True], name=["before", "after"].__getitem__))
def test_killed_as_the_best_weights_are_calibrated(tmp_path, config, undisturbed, after):
    run = tmp_path / "run"
    killed(config, run, Kill(place=write_calibration, after=after))
    assert load_model(run).calibration.was_fitted is after
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


def test_killed_after_the_test_split_was_evaluated(tmp_path, config):
    run = tmp_path / "run"
    evaluated = run / "evaluation" / "test" / "metrics.json"
    killed(config, run, Kill(place=write_evaluation, after=True), more="data.test=test")
    assert not (run / "results.json").exists()
    before = evaluated.read_bytes()
    gone_on(config, run, more="data.test=test")
    assert evaluated.read_bytes() == before
    test = results(run)["test"]
    assert test == {name: json.loads(before)[name] for name in test}


def test_killed_before_the_report_is_drawn(tmp_path, config, undisturbed):
    """Training is done then, but not all that the command does."""
    run, fault = tmp_path / "run", Kill(place=draw_run)
    require_killed(run_ranks(config, f"run.dir={run}", fault=fault, draws=True), fault)
    require_done(run_ranks(config, f"run.dir={run}", draws=True))
    require_equal_runs(undisturbed[1], run)
    assert (run / "report.html").exists()
    assert list((run / "plots").glob("*.png"))
