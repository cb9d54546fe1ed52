"""Disks that fill up or turn read-only under a run: real ones, small, mounted for it, which needs
root; and disks that fail from any call of the run on, the whole of which is
``pytest -m exhaustive tests/system/test_disk_faults.py`` (some 15 minutes).

What a disk may do at each single call of a save: ``test_save_faults.py``.
"""

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import FAIL_ON, FULL, At, DiskFault, Kill, require_killed, require_shim, run_ranks
from tiny_runs import make_dataset, newest_checkpoint, require_equal_runs, tiny_config, write_config

from rtl_dist.features.compute import compute_view
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view_files import write_block
from rtl_dist.model.folder import write_model_folder
from rtl_dist.records.checkpoint import save_checkpoint
from rtl_dist.records.environment import describe_run
from rtl_dist.records.tracking import Tracker
from rtl_dist.training.finish import finish

pytestmark = pytest.mark.launch

CHANGES = {"run__ledger": True, "optim": {"ema": 0.9}, "stages__0__views": 1}
ADVICE = "free space or correct the permissions, then start the same command again"
SAVE = save_checkpoint
LOG = Tracker.log
BALLAST = "ballast"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "c.yaml", tiny_config(dataset, folder / "nowhere", **CHANGES))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> dict[int, Path]:
    runs = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        runs[world_size] = folder / "run"
        start(config, runs[world_size], folder / "features", world_size=world_size)
    return runs


def start(config, run, features, *, world_size=1, fault=None, code=0):
    """Starts a run, all of whose processes must leave with that code and no traceback, and the
    fault must happen."""
    overrides = (f"run.dir={run}", f"features.cache_dir={features}")
    exits = run_ranks(config, *overrides, world_size=world_size, fault=fault)
    assert [one.code for one in exits] == [code] * world_size, "\n".join(e.output for e in exits)
    if fault is not None:
        assert exits[fault.rank].fired
    for one in exits:
        assert "Traceback" not in one.output, one.output
    return exits


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small file system")
    yield folder
    subprocess.run(["umount", "--recursive", str(folder)], check=True, timeout=60)


# --- full --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fill(At):
    """Somebody else fills a disk up to its last ``left`` bytes."""

    disk: str
    left: int = 0

    def happen(self) -> None:
        stat = os.statvfs(self.disk)
        pages = stat.f_bavail - self.left // stat.f_bsize
        with open(Path(self.disk, BALLAST), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, pages * stat.f_bsize)


FULL_AT = [
    (SAVE, 1, 0, ""),  # while it is written the next row or line may be the first to fail
    (SAVE, 3, 600_000, ""),  # in the middle of the optimizer's file
    (SAVE, 9, 4096, "checkpoints/step-00000020"),  # the last one
    (LOG, 1, 0, "metrics.jsonl"),
    (write_model_folder, 1, 100_000, "best"),
    (describe_run, 1, 0, "config.yaml"),
    (finish, 1, 0, "best/config.json"),  # which is told how its scores are read
]


@pytest.mark.parametrize(
    ("place", "call", "left", "said", "world_size"),
    one_of_each(
        [(*one, world_size) for one in FULL_AT for world_size in (1, 2)],
        kind=lambda case: case[:2] if case[4] == 1 else "two ranks",
        name=lambda case: f"{case[0].__name__} {case[1]}, {case[4]} ranks",
    ),
)
def test_a_disk_that_fills_ends_the_run_and_it_goes_on_when_there_is_room(
    tmp_path, disk, config, undisturbed, place, call, left, said, world_size
):
    run, features = disk / "run", tmp_path / "features"
    fault = Fill(place=place, call=call, disk=str(disk), left=left)
    for one in start(config, run, features, fault=fault, code=1, world_size=world_size):
        assert one.last_line.startswith("rtl-dist: cannot write "), one.output
        assert f"{run}/" in one.last_line, one.last_line
        assert said in one.last_line, one.last_line
        assert ADVICE in one.last_line, one.last_line
    (disk / BALLAST).unlink()
    start(config, run, features, world_size=world_size)
    require_equal_runs(undisturbed[world_size], run)


@pytest.mark.parametrize(
    ("place", "left"),
    [
        (compute_view, 0),
        (write_block, 0),
        (FeatureStore.publish, 0),
    ],
)
def test_a_disk_that_fills_with_features_costs_only_time(
    tmp_path, disk, config, undisturbed, place, left
):
    run, features = tmp_path / "run", disk / "features"
    fault = Fill(place=place, disk=str(disk), left=left)
    (outcome,) = start(config, run, features, fault=fault)
    assert "no cached features of train: " in outcome.output
    assert not list(features.glob(".incomplete-*"))
    require_equal_runs(undisturbed[1], run, ledger=False)  # which says what was read as pixels


# --- read-only ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_there", "world_size"),
    one_of_each(
        itertools.product([False, True], [1, 2]),
        kind=lambda case: case[0],
        name=lambda case: f"{'a run to go on with' if case[0] else 'a new run'}, {case[1]} ranks",
    ),
)
def test_a_disk_that_is_read_only_at_the_start_is_refused(
    tmp_path, disk, config, undisturbed, is_there, world_size
):
    run, features = disk / "run", tmp_path / "features"
    if is_there:
        fault = Kill(place=SAVE, call=3)
        overrides = (f"run.dir={run}", f"features.cache_dir={features}")
        require_killed(run_ranks(config, *overrides, world_size=world_size, fault=fault), fault)
    mount("-o", "remount,ro", str(disk))
    before = contents_of(disk)
    for one in start(config, run, features, code=2, world_size=world_size):
        assert one.last_line == (
            f"rtl-dist: cannot write the run folder {run}: Read-only file system; choose another"
            " run.dir"
        )
    assert contents_of(disk) == before
    mount("-o", "remount,rw", str(disk))
    start(config, run, features, world_size=world_size)
    require_equal_runs(undisturbed[world_size], run)


@dataclass(frozen=True, kw_only=True)
class TurnReadOnly(At):
    """A folder, on a mount of its own, can be written no more."""

    folder: str

    def happen(self) -> None:
        mount("--bind", self.folder, self.folder)
        mount("-o", "remount,ro,bind", self.folder)


@pytest.mark.parametrize(
    ("name", "place", "world_size"),
    one_of_each(
        [
            (name, place, world_size)
            for name, place in (("checkpoints", SAVE), ("best", write_model_folder))
            for world_size in (1, 2)
        ],
        kind=lambda case: case[0],
        name=lambda case: f"{case[0]}, {case[2]} ranks",
    ),
)
def test_a_folder_that_turns_read_only_ends_the_run(
    tmp_path, disk, config, undisturbed, name, place, world_size
):
    run, features = disk / "run", tmp_path / "features"
    fault = TurnReadOnly(place=place, call=3, folder=str(run / name))
    before = []
    for one in start(config, run, features, fault=fault, code=1, world_size=world_size):
        assert one.last_line.startswith("rtl-dist: cannot write "), one.output
        assert f"{run / name}" in one.last_line
        assert f"Read-only file system; {ADVICE}" in one.last_line
    assert newest_checkpoint(run).name >= "step-00000005", before
    subprocess.run(["umount", str(run / name)], check=True, timeout=60)
    start(config, run, features, world_size=world_size)
    require_equal_runs(undisturbed[world_size], run)


# --- a whole disk, from any call on ---------------------------------------------------------------

HOW = {"read-only": (FAIL_ON, errno.EROFS), "full": (FULL, errno.ENOSPC)}
SHARES = 40


@pytest.mark.parametrize(("call", "how"), [(12, "full"), (60, "read-only"), (150, "full")])
def test_a_whole_disk_that_fails_ends_the_run(tmp_path, config, undisturbed, call, how):
    """Read-only as a kernel makes it that met an error: files that are open are of no use, either."""
    require_shim()
    assert failed_at(tmp_path, config, undisturbed[1], call, how)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("how", HOW)
def test_a_whole_disk_that_fails_at_any_call_ends_the_run(
    tmp_path, config, undisturbed, share, how
):
    require_shim()
    for call in count(1 + share, SHARES):
        folder = tmp_path / str(call)
        folder.mkdir()
        if not failed_at(folder, config, undisturbed[1], call, how):
            break
        shutil.rmtree(folder)
    assert call > SHARES  # a run makes far more calls


def failed_at(folder: Path, config: str, undisturbed: Path, call: int, how: str) -> bool:
    """Whether a run makes so many calls; its disk then failed from this one on, it said so unless
    it was done by then, and it went on when the disk was as it should be."""
    run, action, error = folder / "run", *HOW[how]
    run.mkdir()
    fault = DiskFault(prefix=str(run), call=call, action=action, error=error)
    overrides = (f"run.dir={run}", f"features.cache_dir={folder / 'features'}")
    (outcome,) = run_ranks(config, *overrides, fault=fault)
    assert "Traceback" not in outcome.output, outcome.output
    if outcome.code:
        assert outcome.fired
        assert outcome.last_line.startswith("rtl-dist: cannot write "), outcome.output
        assert str(run) in outcome.last_line
        if outcome.code == 2:  # nothing had begun
            assert "choose another run.dir" in outcome.last_line
        else:
            assert outcome.code == 1
            assert ADVICE in outcome.last_line
        assert os.strerror(error) in outcome.last_line
        start(config, run, folder / "features")
    require_equal_runs(undisturbed, run)
    return outcome.fired


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
