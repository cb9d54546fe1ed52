"""Killed before or after any step, any number of times, and started again by the same command, a run
ends with the bytes of one that was never disturbed.

What runs by default in these files is a share of a grid; ``pytest -m exhaustive tests/system/kills``
is the rest, some 900 kills.
"""

import shutil
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import DiskFault, Kill, Signal, Together, require_shim
from kills import (
    CROSS,
    EVALUATED_EVERY,
    NUM_STEPS,
    SAVED_EVERY,
    STAGE_ENDS,
    STEP,
    gone_on,
    killed,
    place_of,
    shown,
)
from safetensors.torch import load_file
from tiny_runs import metric_rows, newest_checkpoint, require_equal_runs

from rtl_dist.records.checkpoint import load_newest_checkpoint, save_checkpoint

pytestmark = pytest.mark.launch


def due_before(step: int) -> tuple[bool, ...]:
    """What a run does between the last step and this one."""
    done = step - 1
    return (
        done == 0,
        done in STAGE_ENDS,
        done % SAVED_EVERY == 0,
        done % EVALUATED_EVERY == 0,
    )


def test_one_of_three_ranks_killed(tmp_path, config):
    """With three ranks the order of a sum matters, and DDP's first step adds in one of its own."""
    undisturbed, run, share = tmp_path / "undisturbed", tmp_path / "run", "batch.global=12"
    gone_on(config, undisturbed, world_size=3, more=share)
    killed(config, run, Kill(place=STEP, call=9, rank=1), world_size=3, more=share)
    gone_on(config, run, world_size=3, more=share)
    require_equal_runs(undisturbed, run)


@pytest.mark.parametrize("step", one_of_each(range(1, NUM_STEPS + 1), due_before))
def test_killed_at_any_step(tmp_path, config, undisturbed, step):
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=step))
    assert not (run / "results.json").exists()
    if step > 2 * SAVED_EVERY:
        saved = int(newest_checkpoint(run).name.removeprefix("step-"))
        # one that was being written when the kill came counts for nothing
        assert step - 1 - 2 * SAVED_EVERY < saved < step
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


OF_TWO = [
    Kill(place=STEP, call=step, rank=rank, after=after)
    for step in range(1, NUM_STEPS + 1)
    for rank in (0, 1)
    for after in (False, True)
]


@pytest.mark.parametrize("fault", one_of_each(OF_TWO, place_of, shown))
def test_one_of_two_ranks_killed_at_any_step(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


def test_killed_three_times_in_one_epoch(tmp_path, config, undisturbed):
    """Steps 8 to 10 are of the third epoch; each start goes on from the checkpoint of step 6, or
    from that of step 4 where that was still being written."""
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=8), *[Kill(place=STEP, call=3)] * 2)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


def test_killed_with_workers_that_load(tmp_path, config, undisturbed):
    """Which end with it, and hold nothing that the next start needs."""
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=9), more="data.workers=2")
    gone_on(config, run, more="data.workers=1")
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize("call", one_of_each([2, 3, 4]))
def test_killed_while_it_stops(tmp_path, config, undisturbed, call):
    """As a scheduler does that has waited long enough."""
    run = tmp_path / "run"
    stop = Signal(place=CROSS, call=7)
    killed_in_save = DiskFault(prefix=f"{run}/checkpoints/.incomplete-step-00000007", call=7 * call)
    require_shim()
    killed(config, run, Together(faults=(stop, killed_in_save)))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


# --- on another number of processes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "killed_at", "afterwards"),
    one_of_each(
        [(2, 9, 1), (4, 14, 2), (1, 8, 4)],
        kind=lambda case: case[0] > case[2],  # fewer or more
        name=lambda case: f"{case[0]} to {case[2]}",
    ),
)
def test_killed_and_gone_on_with_another_number_of_processes(
    tmp_path, config, before, killed_at, afterwards, alone_in_float64
):
    run = tmp_path / "run"
    fault = Kill(place=STEP, call=killed_at, rank=before - 1)
    killed(config, run, fault, world_size=before, more="precision=fp64")
    gone_on(config, run, world_size=afterwards, more="precision=fp64")
    samples = [one / "ledger" / "samples.jsonl" for one in (run, alone_in_float64)]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    for name in ("model", "ema", "optimizer"):
        found, wanted = (
            load_file(newest_checkpoint(one) / f"{name}.safetensors")
            for one in (run, alone_in_float64)
        )
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            assert float((value.double() - wanted[key].double()).abs().max()) < 1e-10, key
    for row, expected in zip(metric_rows(run), metric_rows(alone_in_float64), strict=True):
        assert row.pop("stage") == expected.pop("stage")
        assert row == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def alone_in_float64(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("float64") / "run"
    gone_on(config, run, more="precision=fp64")
    return run


# --- the harness itself ------------------------------------------------------------------------


def test_a_kill_that_never_comes_is_told(tmp_path, config):
    with pytest.raises(AssertionError, match="never happened"):
        killed(config, tmp_path / "run", Kill(place=STEP, call=NUM_STEPS + 1))


def test_a_run_that_does_not_go_on_exactly_is_told(tmp_path, config, undisturbed):
    """Its average is a tenth of a percent off."""
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=15))
    snapshot = load_newest_checkpoint(run)
    snapshot.ema = {k: v * 1.001 if v.is_floating_point() else v for k, v in snapshot.ema.items()}
    shutil.rmtree(run / "checkpoints")
    save_checkpoint(run, snapshot, keep=2)
    gone_on(config, run)
    with pytest.raises(AssertionError, match=r"ema\.safetensors"):
        require_equal_runs(undisturbed[1], run)
