"""A save that is killed, or that the disk refuses, at each of its calls of the C library leaves what
was there before, or all of what was to be there.

Renamings that safetensors makes by itself are raw system calls, which ``fault_shim.c`` cannot see;
the calls right before and after them are its own.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from call_faults import ERRORS, KILLS, at_each_call, calls_of
from grids import one_of_each
from killed_runs import KILL, in_child, require_shim

from rtl_dist.core import files
from rtl_dist.records import checkpoint
from rtl_dist.records.checkpoint import Snapshot, load_newest_checkpoint, save_checkpoint
from rtl_dist.records.state import TrainState


@pytest.fixture(autouse=True)
def _shim():
    require_shim()


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        state=TrainState(step=step, since_log=[step, 2**60]),
        model={"w": torch.full((50, 40), float(step)), "n": torch.tensor(step)},
        optimizer={"exp_avg/w": torch.full((50, 40), step + 0.5)},
        ema={"w": torch.full((50, 40), step + 0.25)},
        stage_best={},
        scaler={"scale": 65536.0 * step},
        identity={"classes": ["a", "b"]},
    )


def require_whole(run: Path) -> int:
    """The newest checkpoint has all that was saved; returns its step."""
    found = load_newest_checkpoint(run)
    assert found is not None, "no checkpoint"
    saved = snapshot(found.state.step)
    for name in ("state", "scaler", "identity"):
        assert getattr(found, name) == getattr(saved, name), name
    for name in ("model", "optimizer", "ema", "stage_best"):
        tensors, expected = getattr(found, name), getattr(saved, name)
        assert tensors.keys() == expected.keys(), name
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), name
    return found.state.step


def over_earlier(template: Path, keep: int) -> Callable[[Path], Callable[[], object]]:
    """Saving checkpoint 3 into a copy of a run."""

    def prepare(run: Path) -> Callable[[], object]:
        shutil.copytree(template, run, dirs_exist_ok=True)
        return lambda: save_checkpoint(run, snapshot(3), keep=keep)

    return prepare


def make_template(folder: Path, newest: str) -> list[int]:
    """A run with checkpoints 1 and 2, and one of step 3 if ``newest`` says so, which is damaged;
    returns the steps of the whole ones."""
    for step in (1, 2, 3) if newest == "damaged" else (1, 2):
        save_checkpoint(folder, snapshot(step), keep=3)
    if newest == "damaged":
        (folder / "checkpoints" / "step-00000003" / "state.json").unlink()
    return [1, 2]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def kept(keep: int, newest: int) -> list[str]:
    return [f"step-{step:08d}" for step in range(newest - keep + 1, newest + 1)]


def save_next(run: Path, keep: int) -> None:
    """Saves what a run saves that goes on: 3 again, unless it was there, and 4."""
    for step in range(require_whole(run) + 1, 5):
        save_checkpoint(run, snapshot(step), keep=keep)
        assert require_whole(run) == step
        assert names_in(run) == kept(keep, step)


def kill_saves(template: Path, keep: int, action: int) -> tuple[int, int]:
    """Returns how many calls a save makes, and after how many the new checkpoint counts."""
    published_at, outcome = None, None
    for run, outcome in at_each_call(over_earlier(template, keep), action):
        newest = require_whole(run)
        if newest == 3 and published_at is None:
            published_at = outcome.call
        assert newest == (2 if published_at is None else 3), outcome
        save_next(run, keep)
    assert outcome is not None
    return outcome.call - 1, published_at


@pytest.mark.parametrize(
    ("how", "keep", "newest"),
    [("killed", 1, "whole"), ("killed in mid-write", 2, "damaged")],
)
def test_a_killed_save_leaves_the_newest_checkpoint_whole(tmp_path, how, keep, newest):
    """With another one of the same step that is damaged, too, which the new one replaces."""
    make_template(tmp_path, newest)
    calls, published_at = in_child(kill_saves, tmp_path, keep, KILLS[how])
    assert calls > 30
    assert 20 < published_at < calls


def refuse_saves(template: Path, keep: int, action: int, error: int) -> tuple[int, int]:
    """Returns how many saves failed, and how many got through all the same."""
    before = contents_of(template / "checkpoints" / "step-00000002")
    failed = succeeded = 0
    for run, outcome in at_each_call(over_earlier(template, keep), action, error):
        newest = require_whole(run)
        if outcome.ending == "done":
            succeeded += 1
            assert newest == 3, outcome
        else:
            failed += 1
            assert outcome.ending == "RtlDistError", outcome.message
            assert re.fullmatch(
                r"cannot write checkpoint \S+step-00000003: .+; free space or correct the"
                r" permissions, then start the same command again",
                outcome.message.strip(),
            ), outcome
            assert contents_of(run / "checkpoints" / "step-00000002") == before, outcome
        save_next(run, keep)  # the disk is as it should be again
    return failed, succeeded


@pytest.mark.parametrize("how", one_of_each(ERRORS, lambda how: ERRORS[how][0]))
def test_a_refused_save_leaves_the_older_checkpoint_and_says_so(tmp_path, how):
    make_template(tmp_path, "whole")
    failed, succeeded = in_child(refuse_saves, tmp_path, 1, *ERRORS[how])
    assert failed > 15
    assert succeeded >= 1  # while older ones are deleted errors do no harm


def leftovers_of_killed_saves(template: Path) -> list[str]:
    found = set()
    for run, _ in at_each_call(over_earlier(template, 2), KILL):
        save_checkpoint(run, snapshot(5), keep=2)  # not the step that was being saved
        save_checkpoint(run, snapshot(6), keep=2)
        found |= set(names_in(run)) - {"step-00000005", "step-00000006"}
    return sorted(found)


def test_what_a_killed_save_left_behind_goes_with_the_next_one(tmp_path):
    make_template(tmp_path, "whole")
    assert in_child(leftovers_of_killed_saves, tmp_path) == []


def order_of_a_save(run: Path) -> list[str]:
    make_template(run, "whole")
    return calls_of(lambda: save_checkpoint(run, snapshot(3), keep=1), run)


def test_all_is_flushed_to_disk_before_it_counts_and_before_the_old_goes(tmp_path):
    """What a power cut leaves: files are on the disk before their folder gets its name, and the
    name is before anything older goes."""
    calls = in_child(order_of_a_save, tmp_path)
    folder = "checkpoints/.incomplete-step-00000003"
    (published,) = [n for n, call in enumerate(calls) if call == "rename checkpoints/step-00000003"]
    last_change = max(n for n, call in enumerate(calls) if call.startswith(f"write {folder}/"))
    flushed = calls[last_change + 1 : published]
    for kind in ("model", "optimizer", "ema", "stage_best"):
        assert f"fsync {folder}/{kind}.safetensors" in flushed
    for name in ("state.json", "manifest.json"):
        assert f"fsync {folder}/{name}" in flushed
    assert flushed[-1] == f"fsync {folder}"
    assert len([call for call in calls if call.startswith(f"write {folder}/")]) >= 6
    assert calls[published + 1] == "fsync checkpoints"
    assert all(
        "step-00000001" in call or "step-00000002" in call for call in calls[published + 2 :]
    )


def save_in_place(run: Path, saved: Snapshot, *, keep: int) -> None:
    """How not to do it: the folder bears its name before it is whole, and the old one goes first."""
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    folder = run / "checkpoints" / f"step-{saved.state.step:08d}"
    folder.mkdir(parents=True)
    for name in ("model", "optimizer", "ema", "stage_best"):
        files.save_tensors(getattr(saved, name), folder / f"{name}.safetensors")


def kill_saves_in_place(template: Path) -> None:
    checkpoint.save_checkpoint = globals()["save_checkpoint"] = save_in_place
    kill_saves(template, 2, KILL)


def test_a_save_in_place_would_be_found_out(tmp_path):
    make_template(tmp_path, "whole")
    with pytest.raises(AssertionError, match="kill_saves_in_place failed"):
        in_child(kill_saves_in_place, tmp_path)
