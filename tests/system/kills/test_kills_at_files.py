"""Killed at any change of a file, in the run's folder or among the cached features, and started again,
a run ends with the bytes of one that was never disturbed, and leaves nothing behind.
"""

import shutil
from itertools import count
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import (
    HALF,
    KILL,
    DiskFault,
    Kill,
    require_done,
    require_killed,
    require_shim,
    run_ranks,
)
from kills import gone_on, killed
from tiny_runs import require_equal_runs, tiny_config, write_config

from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view_files import write_block

pytestmark = pytest.mark.launch

# --- at every change of a file -----------------------------------------------------------------

SHARES = 40


def test_killed_at_any_change_of_the_run_folder(tmp_path, config, undisturbed):
    """Between two changes of files nothing on the disk tells one moment from another."""
    require_shim()
    for call in (60, 321):
        assert killed_at_change(tmp_path / str(call), config, undisturbed[1], call)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(SHARES))
def test_killed_at_every_change_of_the_run_folder(tmp_path, config, undisturbed, share):
    require_shim()
    for call in count(1 + share, SHARES):
        run = tmp_path / str(call)
        if not killed_at_change(run, config, undisturbed[1], call):
            break
        shutil.rmtree(run)
    assert call > SHARES  # a run makes far more changes


def killed_at_change(run: Path, config: str, undisturbed: Path, call: int) -> bool:
    """Whether a run makes so many changes; it is then killed at this one, and goes on."""
    run.mkdir()
    fault = DiskFault(prefix=f"{run}/", call=call, action=HALF if call % 2 else KILL)
    exits = run_ranks(config, f"run.dir={run}", fault=fault)
    if not exits[0].fired:
        require_done(exits)
        require_equal_runs(undisturbed, run)
        return False
    require_killed(exits, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed, run)
    return True


@pytest.mark.parametrize("call", one_of_each(range(1, 33), lambda call: (call - 1) // 8))
def test_killed_while_the_best_weights_are_written(tmp_path, config, undisturbed, call):
    """Each of the first two times takes 16 calls."""
    require_shim()
    run = tmp_path / "run"
    killed(config, run, DiskFault(prefix=str(run / "best"), call=call, action=HALF))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("best", 12),  # in the middle of a file
        ("best", 14),
        (".config.yaml.", 3),
        (".results.json.", 3),
        ("checkpoints/.incomplete-step-00000012", 9),
        ("checkpoints/.gone-step-00000015", 3),  # when the last one was saved
    ],
)
def test_what_a_kill_left_behind_goes_when_the_run_goes_on(
    tmp_path, config, undisturbed, name, call
):
    """Large files that nobody knows of would fill the disk, some with each kill."""
    require_shim()
    run = tmp_path / "run"
    killed(config, run, DiskFault(prefix=f"{run}/{name}", call=call, action=HALF))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)
    assert files_of(run) == files_of(undisturbed[1])


def files_of(run: Path) -> set[str]:
    """All but the heartbeats, whose number is the processes'."""
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith("heartbeats/")}


# --- while features are computed ---------------------------------------------------------------


@pytest.fixture(scope="module")
def on_features(dataset, tmp_path_factory) -> tuple[str, Path]:
    """A config whose first two stages train on cached features, and its run undisturbed."""
    folder = tmp_path_factory.mktemp("on_features")
    changes = {"stages__0__views": 1, "stages__1__views": 1, "optim": {"ema": 0.9}}
    content = tiny_config(dataset, folder / "nowhere", **changes)
    config, run = write_config(folder / "c.yaml", content), folder / "run"
    exits = run_ranks(config, f"run.dir={run}", f"features.cache_dir={folder / 'features'}")
    require_done(exits)
    assert exits[0].output.count("on cached features from below") == 2
    return config, run


@pytest.mark.parametrize("call", one_of_each(range(1, 60), lambda call: (call - 1) // 15))
def test_killed_while_features_are_computed(tmp_path, on_features, call):
    """One view takes some 29 calls: to reserve room, to write the blocks and to publish them."""
    require_shim()
    config, undisturbed = on_features
    run, features = tmp_path / "run", tmp_path / "features"
    more = f"features.cache_dir={features}"
    killed(config, run, DiskFault(prefix=f"{features}/", call=call, action=HALF), more=more)
    gone_on(config, run, more=more)
    require_equal_runs(undisturbed, run)
    require_whole_views(features)


@pytest.mark.parametrize("rank", one_of_each([0, 1]))
def test_one_of_two_ranks_killed_while_features_are_computed(tmp_path, on_features, rank):
    config, _ = on_features
    run, features = tmp_path / "run", tmp_path / "features"
    more = f"features.cache_dir={features}"
    fault = Kill(place=write_block, call=3, rank=rank)
    killed(config, run, fault, world_size=2, more=more)
    assert not [path for path in features.iterdir() if not path.name.startswith(".")]
    gone_on(config, run, world_size=2, more=more)
    require_whole_views(features)
    gone_on(config, tmp_path / "undisturbed", world_size=2, more=more)  # and finds them all
    require_equal_runs(tmp_path / "undisturbed", run)


def require_whole_views(features: Path) -> None:
    store = FeatureStore(features, 10**9)
    views = [path.name for path in features.iterdir() if not path.name.startswith(".")]
    assert len(views) == 4  # of train and val, in two stages
    assert all(store.is_sound(view, rank=0, world_size=1) for view in views)
