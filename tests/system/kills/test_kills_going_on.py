"""Killed while it goes on after a kill, and started again, a run ends with the bytes of one that was
never disturbed.
"""

import shutil
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import HALF, DiskFault, Kill, require_shim
from kills import LOAD, STEP, gone_on, killed, shown
from tiny_runs import require_equal_runs

from rtl_dist.optim.named_state import restore_optimizer
from rtl_dist.records.environment import describe_run
from rtl_dist.records.ledger import Ledger
from rtl_dist.records.tracking import Tracker

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def killed_once(config, tmp_path_factory) -> Path:
    """A run that was killed in its second stage."""
    run = tmp_path_factory.mktemp("killed_once") / "run"
    killed(config, run, Kill(place=STEP, call=10))
    return run


@pytest.mark.parametrize(
    "fault",
    [
        Kill(place=LOAD),
        Kill(place=LOAD, after=True),
        Kill(place=describe_run, after=True),
        Kill(place=Tracker.__init__, after=True),
        Kill(place=restore_optimizer, after=True),
        Kill(place=Ledger.__init__, after=True),
        Kill(place=STEP),
    ],
    ids=shown,
)
def test_killed_while_going_on(tmp_path, config, undisturbed, killed_once, fault):
    """Twice at the same place, and the third time it gets through."""
    run = Path(shutil.copytree(killed_once, tmp_path / "run"))
    killed(config, run, fault, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize(
    "fault", one_of_each([Kill(place=LOAD, rank=1), Kill(place=LOAD, after=True)], name=shown)
)
def test_one_of_two_ranks_killed_while_going_on(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=10), fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


GOING_ON_CHANGES = 17  # until the first step is taken


@pytest.mark.parametrize(
    "call", one_of_each(range(1, GOING_ON_CHANGES), lambda call: (call - 1) // 8)
)
def test_killed_at_any_change_while_going_on(tmp_path, config, undisturbed, killed_once, call):
    require_shim()
    run = Path(shutil.copytree(killed_once, tmp_path / "run"))
    killed(config, run, DiskFault(prefix=f"{run}/", call=call, action=HALF))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)
