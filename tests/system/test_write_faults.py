"""A run whose disk refuses a write says so in one line, or trains without what it can do without; and
it goes on to the same bytes when it can.

What each single call of a save leaves: ``test_save_faults.py``; whole disks: ``test_disk_faults.py``.
"""

import errno
import filecmp
import itertools
import shutil
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import FAIL, FAIL_ON, FULL, DiskFault, Exit, require_done, require_shim, run_ranks
from tiny_runs import make_dataset, require_equal_runs, tiny_config, write_config

pytestmark = pytest.mark.launch

HOW = {
    "full from then on": (FULL, errno.ENOSPC),
    "an error once": (FAIL, errno.EIO),
    "errors from then on": (FAIL_ON, errno.EIO),
}


@pytest.fixture(autouse=True)
def _shim():
    require_shim()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


CHANGES = {"run__ledger": True, "optim": {"ema": 0.9}, "stages__0__views": 1}


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "c.yaml", tiny_config(dataset, folder / "nowhere", **CHANGES))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    exits = run_ranks(config, f"run.dir={folder / 'run'}", f"features.cache_dir={folder / 'f'}")
    require_done(exits)
    assert "on cached features" in exits[0].output
    return folder / "run"


def require_one_line(outcome: Exit, *said: str) -> None:
    """It failed, and its last line says so and what to do; no traceback."""
    assert outcome.fired, outcome.output
    assert outcome.code == 1, f"{outcome.code}\n{outcome.output}"
    assert "Traceback" not in outcome.output, outcome.output
    assert outcome.last_line.startswith("rtl-dist: "), outcome.output
    for words in said:
        assert words in outcome.last_line, outcome.last_line


FULL_AT = [
    *[(".config.yaml.", call) for call in (1, 2)],
    (".environment.json.", 2),
    *[("metrics.jsonl", call) for call in (1, 2, 3, 5, 9)],
    *[("ledger/samples.jsonl", call) for call in (1, 4, 10)],
    *[("checkpoints", call) for call in (1, 3, 20, 50)],
    *[("best", call) for call in (1, 4, 10, 12, 29)],
    *[(".results.json.", call) for call in (1, 2)],
]
ERRORS_AT = [
    (".config.yaml.", 3),  # flushing it
    *[("metrics.jsonl", call) for call in (2, 4)],  # cutting it, flushing it
    *[("checkpoints", call) for call in (20, 31)],
    *[("best", call) for call in (5, 15)],
    (".results.json.", 3),
]


@pytest.mark.parametrize(
    ("name", "call", "how"),
    one_of_each(
        [(*one, "full from then on") for one in FULL_AT]
        + [(*one, "an error once") for one in ERRORS_AT],
        kind=lambda case: (case[0], case[2]),
        name=lambda case: f"{case[0]} {case[1]} {case[2]}",
    ),
)
def test_a_run_that_cannot_write_says_so_and_goes_on_when_it_can(
    tmp_path, config, undisturbed, name, call, how
):
    run = tmp_path / "run"
    run.mkdir()
    action, error = HOW[how]
    fault = DiskFault(prefix=f"{run}/{name}", call=call, action=action, error=error)
    (outcome,) = run_ranks(config, f"run.dir={run}", fault=fault)
    require_one_line(
        outcome, "cannot write", name.strip("."), "free space or correct the permissions"
    )
    require_done(run_ranks(config, f"run.dir={run}"))
    require_equal_runs(undisturbed, run)


@pytest.mark.parametrize(
    ("call", "how"),
    one_of_each(
        itertools.product([1, 2, 3, 8, 20, 26], ["full from then on", "errors from then on"]),
        kind=lambda case: (case[0] < 8, case[1]),  # before or while the blocks are written
        name=lambda case: f"{case[0]} {case[1]}",
    ),
)
def test_a_run_that_cannot_keep_features_trains_without(tmp_path, config, undisturbed, call, how):
    run, features = tmp_path / "run", tmp_path / "features"
    features.mkdir()
    action, error = HOW[how]
    fault = DiskFault(prefix=f"{features}/", call=call, action=action, error=error)
    exits = run_ranks(config, f"run.dir={run}", f"features.cache_dir={features}", fault=fault)
    assert exits[0].fired
    require_done(exits)
    assert "no cached features of train: " in exits[0].output
    require_equal_runs(undisturbed, run, ledger=False)  # which says what was read as pixels


@pytest.mark.parametrize("how", one_of_each(["full from then on", "errors from then on"]))
def test_heartbeats_that_cannot_be_written_do_no_harm(tmp_path, config, undisturbed, how):
    run = tmp_path / "run"
    run.mkdir()
    action, error = HOW[how]
    fault = DiskFault(prefix=f"{run}/heartbeats", but_not="", call=1, action=action, error=error)
    exits = run_ranks(config, f"run.dir={run}", fault=fault)
    assert exits[0].fired
    require_done(exits)
    require_equal_runs(undisturbed, run)


def test_the_two_runs_of_these_tests_can_be_told_apart(undisturbed, tmp_path):
    """``require_equal_runs`` compares what it says."""
    other = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    require_equal_runs(undisturbed, other)
    for name in ("best/config.json", "ledger/samples.jsonl", "results.json"):
        (other / name).write_text((undisturbed / name).read_text().replace("1", "2"))
        with pytest.raises(AssertionError):
            require_equal_runs(undisturbed, other)
        shutil.copy(undisturbed / name, other / name)
    assert filecmp.cmp(undisturbed / "results.json", other / "results.json", shallow=False)
