"""A save that is killed, or that the disk refuses, at each of its calls of the C library leaves what
was there before, or all of what was to be there.

Renamings that safetensors makes by itself are raw system calls, which ``fault_shim.c`` cannot see;
the calls right before and after them are its own.
"""

import errno
import filecmp
import json
import os
import re
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import (
    COUNT,
    FAIL,
    FAIL_ON,
    FULL,
    HALF,
    KILL,
    DiskFault,
    Exit,
    arm,
    in_child,
    require_done,
    require_shim,
    run_ranks,
)
from tiny_runs import make_dataset, require_equal_runs, tiny_config, write_config

from rtl_dist.core import files
from rtl_dist.core.errors import RtlDistError
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view_files import ViewShape, write_block
from rtl_dist.records import checkpoint
from rtl_dist.records.checkpoint import Snapshot, load_newest_checkpoint, save_checkpoint
from rtl_dist.records.state import TrainState

KILLS = {"killed": KILL, "killed in mid-write": HALF}
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where flushing costs nothing
ERRORS = {
    "no space once": (FAIL, errno.ENOSPC),
    "full from then on": (FULL, errno.ENOSPC),
    "an error once": (FAIL, errno.EIO),
    "errors from then on": (FAIL_ON, errno.EIO),
    "read-only from then on": (FAIL_ON, errno.EROFS),
}


@pytest.fixture(autouse=True)
def _shim():
    require_shim()


# --- a fault at each call ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of an action with a fault at one call. ending: ``done``, ``killed``, or what was raised."""

    call: int
    ending: str
    message: str = ""


def at_each_call(
    prepare: Callable[[Path], Callable[[], object]], action: int, error: int = 0
) -> Iterator[tuple[Path, Outcome]]:
    """Does the same with a fault at its first call, at its second, and so on until there is none
    left; each time in a folder that ``prepare`` filled, by what ``prepare`` returned, in a fork.
    """
    call = 0
    while True:
        call += 1
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
            folder = Path(name, "run")
            folder.mkdir()
            act = prepare(folder)
            told, mark = Path(name, "told"), Path(name, "mark")
            pid = os.fork()
            if not pid:
                _act(act, folder, call, action, error, told, mark)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code == -signal.SIGKILL:
                assert mark.stat().st_size, "killed by somebody else"
                yield folder, Outcome(call, "killed")
                continue
            assert code == 0, f"the child left with {code}"
            kind, _, message = told.read_text().partition("\n")
            yield folder, Outcome(call, kind, message)
            if not mark.stat().st_size:
                assert kind == "done", message
                return


def _act(
    act: Callable[[], object],
    folder: Path,
    call: int,
    action: int,
    error: int,
    told: Path,
    mark: Path,
) -> None:
    """In the fork, which never returns."""
    try:
        arm(f"{folder}/", call, action, error, mark=os.open(mark, os.O_CREAT | os.O_WRONLY))
        try:
            act()
        except RtlDistError as raised:
            text = f"RtlDistError\n{raised}"
        except Exception:  # noqa: BLE001 - told to the parent
            text = f"crash\n{traceback.format_exc()}"
        else:
            text = "done\n"
        arm("", 0, COUNT)
        told.write_text(text)
    finally:
        os._exit(0 if told.exists() else 1)


def calls_of(act: Callable[[], object], folder: Path) -> list[str]:
    """``<call> <path in folder>`` of all that an action changes."""
    trace = os.memfd_create("trace")
    arm(f"{folder}/", 0, COUNT, trace=trace)
    act()
    arm("", 0, COUNT)
    os.lseek(trace, 0, os.SEEK_SET)
    return os.read(trace, 1 << 20).decode().splitlines()


# --- checkpoints -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("keep", "newest"), [(1, "whole"), (2, "damaged")])
@pytest.mark.parametrize("how", KILLS)
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


@pytest.mark.parametrize("how", ERRORS)
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


# --- files that are replaced -------------------------------------------------------------------


OLD, NEW = {"number": 1, "text": "old " * 5000}, {"number": 2, "text": "new " * 5000}


def replaced_text(folder: Path) -> Callable[[], object]:
    file = folder / "within" / "file.json"
    files.write_json(file, OLD)
    return lambda: files.write_json(file, NEW)


def fault_replacements(action: int, error: int) -> int:
    """Returns how many calls one makes."""
    outcome = None
    for folder, outcome in at_each_call(replaced_text, action, error):
        found = json.loads((folder / "within" / "file.json").read_text())
        assert found in ((NEW,) if outcome.ending == "done" else (OLD, NEW)), outcome
        if outcome.ending == "crash":
            assert f"[Errno {error}]" in outcome.message  # an OSError, for callers to put in words
        if outcome.ending != "killed" and action != FAIL_ON:
            assert [path.name for path in (folder / "within").iterdir()] == ["file.json"], outcome
    assert outcome is not None
    return outcome.call - 1


@pytest.mark.parametrize("how", [*KILLS, *ERRORS])
def test_a_file_is_the_old_or_the_new_one(how):
    action, error = ERRORS.get(how) or (KILLS[how], 0)
    assert in_child(fault_replacements, action, error) >= (3 if action == FULL else 6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def prepared_best(dataset: Path) -> tuple[Callable[[Path, float], None], Callable[[Path], float]]:
    """To write a model folder whose weights are all one number; and to read that number."""
    from rtl_dist.config import load_config
    from rtl_dist.data.format.dataset import open_dataset
    from rtl_dist.model.build import build_model
    from rtl_dist.model.folder import load_model, write_model_folder

    with tempfile.TemporaryDirectory() as folder:
        content = tiny_config(dataset, Path(folder, "run"))
        config = load_config(write_config(Path(folder, "c.yaml"), content))
    data = open_dataset(dataset)
    model, _ = build_model(config.model, config.data, classes=data.classes, seed=0)

    def write(best: Path, number: float) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        write_model_folder(best, model, config.model, data, precision=config.precision)

    def read(best: Path) -> float:
        (number,) = {
            value
            for parameter in load_model(best).model.parameters()
            for value in parameter.unique().tolist()
        }
        return number

    return write, read


def fault_best_weights(dataset: Path, action: int, error: int) -> int:
    """Returns how many calls writing ``best/`` makes."""
    write, read = prepared_best(dataset)

    def prepare(folder: Path) -> Callable[[], object]:
        write(folder / "best", 1)
        return lambda: write(folder / "best", 2)

    outcome = None
    for folder, outcome in at_each_call(prepare, action, error):
        number = read(folder / "best")
        assert number in ((2,) if outcome.ending == "done" else (1, 2)), outcome
        if outcome.ending == "crash":
            assert (
                f"[Errno {errno.EIO}]" in outcome.message or f"[Errno {error}]" in outcome.message
            )
        write(folder / "best", 3)
        assert read(folder / "best") == 3
    assert outcome is not None
    return outcome.call - 1


@pytest.mark.parametrize("how", [*KILLS, *ERRORS])
def test_the_best_weights_are_the_old_or_the_new_ones(dataset, how):
    action, error = ERRORS.get(how) or (KILLS[how], 0)
    assert in_child(fault_best_weights, dataset, action, error) >= 12


# --- cached features ---------------------------------------------------------------------------


ROWS = torch.arange(200 * 30, dtype=torch.float32).view(200, 30)
SHAPE = ViewShape(num_samples=200, row=(30,), dtype=torch.float32, block_size=64)
KEY = "0" * 32


def add_view(store: FeatureStore) -> None:
    """As ``features`` does, by one rank."""
    folder = store.reserve(KEY, SHAPE, keep=set())
    try:
        blocks = range(0, 200, 64)
        checksums = [write_block(folder, first, ROWS[first : first + 64]) for first in blocks]
        used = np.arange(200)
        store.publish(folder, KEY, SHAPE, checksums=checksums, used=used, bad=[], content={})
    finally:
        store.discard(folder)


def fault_views(action: int, error: int) -> int:
    """Returns how many calls making a view makes."""
    outcome = None

    def prepare(folder: Path) -> Callable[[], object]:
        (folder / "store").mkdir()
        return lambda: add_view(FeatureStore(folder / "store", 10**9))

    for folder, outcome in at_each_call(prepare, action, error):
        store = FeatureStore(folder / "store", 10**9)
        if outcome.ending == "done":
            assert store.has(KEY)
        elif outcome.ending == "crash":
            assert "OSError" in outcome.message, outcome.message
            if action != FAIL_ON:
                assert [path.name for path in store.root.iterdir()] in ([], [KEY]), outcome
        if not store.has(KEY):
            add_view(store)
        assert store.is_sound(KEY, rank=0, world_size=1), outcome
        view = store.open(KEY)
        assert torch.equal(view.features, ROWS)
        assert view.used.tolist() == list(range(200))
    assert outcome is not None
    return outcome.call - 1


def order_of_a_view(folder: Path) -> list[str]:
    folder.mkdir()
    return calls_of(lambda: add_view(FeatureStore(folder, 10**9)), folder)


def test_all_of_a_view_is_flushed_to_disk_before_it_counts(tmp_path):
    calls = in_child(order_of_a_view, tmp_path / "store")
    (published,) = [n for n, call in enumerate(calls) if call == f"rename {KEY}"]
    for name in ("features.bin", "used.npy", "description.json"):
        (flushed,) = [n for n, call in enumerate(calls) if re.match(rf"fsync .+/{name}", call)]
        written = [n for n, call in enumerate(calls) if re.match(rf"write .+/{name}", call)]
        assert written, name
        assert max(written) < flushed < published


@pytest.mark.parametrize("how", [*KILLS, *ERRORS])
def test_a_view_is_whole_or_not_there(how):
    action, error = ERRORS.get(how) or (KILLS[how], 0)
    assert in_child(fault_views, action, error) >= 12


# --- whole runs --------------------------------------------------------------------------------


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
    [(*one, "full from then on") for one in FULL_AT]
    + [(*one, "an error once") for one in ERRORS_AT],
)
def test_a_run_that_cannot_write_says_so_and_goes_on_when_it_can(
    tmp_path, config, undisturbed, name, call, how
):
    run = tmp_path / "run"
    run.mkdir()
    action, error = ERRORS[how]
    fault = DiskFault(prefix=f"{run}/{name}", call=call, action=action, error=error)
    (outcome,) = run_ranks(config, f"run.dir={run}", fault=fault)
    require_one_line(
        outcome, "cannot write", name.strip("."), "free space or correct the permissions"
    )
    require_done(run_ranks(config, f"run.dir={run}"))
    require_equal_runs(undisturbed, run)


@pytest.mark.parametrize("how", ["full from then on", "errors from then on"])
@pytest.mark.parametrize("call", [1, 2, 3, 8, 20, 26])
def test_a_run_that_cannot_keep_features_trains_without(tmp_path, config, undisturbed, call, how):
    run, features = tmp_path / "run", tmp_path / "features"
    features.mkdir()
    action, error = ERRORS[how]
    fault = DiskFault(prefix=f"{features}/", call=call, action=action, error=error)
    exits = run_ranks(config, f"run.dir={run}", f"features.cache_dir={features}", fault=fault)
    assert exits[0].fired
    require_done(exits)
    assert "no cached features of train: " in exits[0].output
    require_equal_runs(undisturbed, run, ledger=False)  # which says what was read as pixels


@pytest.mark.parametrize("how", ["full from then on", "errors from then on"])
def test_heartbeats_that_cannot_be_written_do_no_harm(tmp_path, config, undisturbed, how):
    run = tmp_path / "run"
    run.mkdir()
    action, error = ERRORS[how]
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
