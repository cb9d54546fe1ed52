"""Every rank tells where it is, and a job of which one does not go on ends with a line that says so."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import At, require_done, run_ranks
from tiny_runs import make_dataset, require_equal_runs, tiny_config, write_config

from rtl_dist.core.errors import DataError
from rtl_dist.distributed import watch
from rtl_dist.distributed.heartbeat import Heartbeat
from rtl_dist.distributed.watch import Watch, clear_heartbeats
from rtl_dist.evaluation.logits import logits_from_images
from rtl_dist.model.batchnorm import StepStatistics
from rtl_dist.model.build import build_model
from rtl_dist.model.folder import write_model_folder
from rtl_dist.records.checkpoint import save_checkpoint
from rtl_dist.training.stage_optimizer import StageOptimizer
from rtl_dist.training.stage_trainer import StageTrainer

STEP = StageTrainer.step
NEXT = StageTrainer.next_batch
EVALUATE = logits_from_images
TIMEOUT = "run.timeout=4 seconds"


@dataclass(frozen=True, kw_only=True)
class Stall(At):
    """SIGSTOP: the process is there, and does nothing any more. A heartbeat comes before it."""

    def happen(self) -> None:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True, kw_only=True)
class StopWorkers(At):
    """SIGSTOP for the loader's processes; then_asked: and a request to stop a while later."""

    then_asked: bool = False

    def happen(self) -> None:
        if self.then_asked:
            threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGSTOP)


@dataclass(frozen=True, kw_only=True)
class Hold(At):
    """The main thread stands still, the process lives."""

    seconds: float

    def happen(self) -> None:
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), val=150)


@pytest.fixture
def config(dataset, tmp_path) -> str:
    return write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run"))


def survivors_last_line(config: str, fault: At, *overrides: str) -> str:
    """Of two ranks, of which one stands still and is ended by us once the other has left."""
    exits = run_ranks(config, TIMEOUT, *overrides, world_size=2, fault=fault, end_stalled=True)
    assert exits[fault.rank].fired
    assert exits[fault.rank].code == -signal.SIGKILL
    other = exits[1 - fault.rank]
    assert other.code == 1, other.output
    assert "Traceback" not in other.output
    return other.last_line


@pytest.mark.launch
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_stalled_rank_ends_the_job_and_is_named(config, tmp_path, dataset, rank):
    line = survivors_last_line(config, Stall(place=STEP, call=8, rank=rank))
    found = re.fullmatch(
        rf"rtl-dist: rank {rank} \(process \d+ on \S+\) made no progress for 4 s \(run.timeout\).*"
        r"phase (.+), stage (.+), step (\d+), last sample (\S+); see .*",
        line,
    )
    assert found, line
    assert found[1] == "training"
    assert found[2] == "top"
    assert found[3] == "6"  # the last that it worked on
    require_done(run_ranks(config, world_size=2))
    alone = write_config(tmp_path / "a.yaml", tiny_config(dataset, tmp_path / "alone"))
    require_done(run_ranks(alone, world_size=2))
    require_equal_runs(tmp_path / "alone", tmp_path / "run")


@pytest.mark.launch
def test_a_rank_that_stalls_in_an_evaluation(config):
    line = survivors_last_line(config, Stall(place=EVALUATE, item=1, rank=1))
    assert line.startswith("rtl-dist: rank 1 "), line
    assert "phase evaluating" in line


@pytest.mark.launch
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_loader_that_stalls(config, world_size):
    """Its rank lives, and waits for no other."""
    fault = StopWorkers(place=NEXT, call=5, rank=world_size - 1)
    exits = run_ranks(
        config, TIMEOUT, "data.workers=1", "stages.0.cache=off", "stages.0.steps=200",
        world_size=world_size, fault=fault,
    )  # fmt: skip
    assert exits[fault.rank].fired
    said = next(one.last_line for one in exits if "made no progress" in one.output)
    assert f"rank {fault.rank} (" in said
    assert "phase waiting for data" in said
    assert {one.code for one in exits} == {1}


@pytest.mark.launch
@pytest.mark.parametrize(
    "place",
    one_of_each(
        [StageTrainer.learn_from, StageOptimizer.step, StepStatistics.fold],
        name=lambda place: place.__qualname__,
    ),
)
def test_of_two_ranks_that_live_the_one_that_holds_the_other_up_is_named(config, place):
    fault = Hold(place=place, call=15, rank=1, seconds=60.0)
    exits = run_ranks(config, TIMEOUT, world_size=2, fault=fault)
    assert exits[1].fired
    said = "".join(one.output for one in exits)  # where both are mid-step either may tell
    assert "rank 1 (" in said
    assert "rank 0 (" not in said
    assert [one.code for one in exits] == [1, 1]


@pytest.mark.launch
def test_a_stop_while_a_loader_stalls_saves_the_last_whole_step(config, tmp_path, dataset):
    overrides = ("data.workers=1", "stages.0.cache=off")
    fault = StopWorkers(place=NEXT, call=4 * 2 + 1, then_asked=True)
    exits = run_ranks(config, *overrides, fault=fault)
    assert exits[0].fired
    assert exits[0].code == 75, exits[0].output
    assert "stopped at step" in exits[0].last_line
    assert (tmp_path / "run" / "checkpoints").exists()
    require_done(run_ranks(config, *overrides))
    alone = write_config(tmp_path / "a.yaml", tiny_config(dataset, tmp_path / "alone"))
    require_done(run_ranks(alone, *overrides))
    require_equal_runs(tmp_path / "alone", tmp_path / "run")


@pytest.mark.launch
@pytest.mark.parametrize(
    "place",
    one_of_each(
        [
            build_model,
            save_checkpoint,  # in its thread: the next one waits for it
            write_model_folder,
        ],
        name=lambda place: place.__qualname__,
    ),
)
def test_a_rank_that_works_for_long_is_waited_for(config, place):
    """Twice the time-out in a phase that may take any time; in any other it would be ended."""
    fault = Hold(place=place, seconds=4.5, rank=0)
    exits = run_ranks(config, "run.timeout=2 seconds", world_size=2, fault=fault)
    require_done(exits)
    assert exits[0].fired


@pytest.mark.launch
def test_what_a_heartbeat_says(config, tmp_path):
    require_done(run_ranks(config, fault=Hold(place=STEP, call=11, seconds=1.5)))
    content = json.loads((tmp_path / "run" / "heartbeats" / "rank-00000.json").read_text())
    assert content["phase"] == "ended"
    assert content["rank"] == 0
    assert content["step"] == 19
    assert content["stage"] == "all"
    assert re.fullmatch(r"\d{7}_\d{3}|[\w/-]+", content["sample"])


# --- one watcher, and files that stand for the others ---


class GaveUpError(Exception):
    pass


class Watcher(Watch):
    """Looks when it is told to."""

    def __init__(self, run: Path, heartbeat: Heartbeat, world_size: int, rank: int = 0) -> None:
        super().__init__(run, heartbeat, rank=rank, world_size=world_size, timeout_s=100.0)
        self.now = time.monotonic()
        self._moved_at = self.now
        (run / "heartbeats").mkdir(exist_ok=True)

    def after(self, seconds: float) -> set[int]:
        self.now += seconds
        self._ticks += 1
        self._write()
        return set(self._stalled(self.now))


def tell(run: Path, rank: int, **content: object) -> None:
    whole = {"phase": "training", "ticks": 0, "progress": 0, "waiting": False, "open_ended": False}
    path = run / "heartbeats" / f"rank-{rank:05d}.json"
    path.write_text(json.dumps(whole | content))


def test_a_rank_that_does_not_tick_is_stalled(tmp_path):
    watcher = Watcher(tmp_path, Heartbeat(), 2)
    tell(tmp_path, 1)
    found = [watcher.after(10) for _ in range(10)]
    assert found[:8] == [set()] * 8
    assert found[-1] == {1}


def test_ranks_that_tick_but_do_not_get_on_are_stalled_at_the_time_out(tmp_path):
    heartbeat = Heartbeat()
    watcher = Watcher(tmp_path, heartbeat, 2)
    found = []
    with heartbeat.waiting():
        for tick in range(11):
            tell(tmp_path, 1, ticks=tick)
            found.append(watcher.after(10))
    assert found[:9] == [set()] * 9
    assert found[-1] == {1}, "the one that waits for no other"


@pytest.mark.parametrize("why", ["gets on", "is open-ended"])
def test_a_rank_that_works_keeps_the_others_waiting(tmp_path, why):
    watcher = Watcher(tmp_path, Heartbeat(), 2)
    for tick in range(100):
        progress = tick if why == "gets on" else 0
        tell(tmp_path, 1, ticks=tick, progress=progress, open_ended=why == "is open-ended")
        assert watcher.after(10) == set()


def test_nothing_is_read_while_this_rank_gets_on(tmp_path):
    heartbeat = Heartbeat()
    watcher = Watcher(tmp_path, heartbeat, 3)  # the others have no file at all
    for _ in range(100):
        heartbeat.beat()
        assert watcher.after(10) == set()


def test_one_that_ended_is_not_stalled(tmp_path):
    heartbeat = Heartbeat()
    watcher = Watcher(tmp_path, heartbeat, 2)
    tell(tmp_path, 1, phase="ended")
    with heartbeat.phase("drawing", open_ended=True):
        for _ in range(100):
            assert watcher.after(10) == set()


def test_a_run_folder_that_not_all_hosts_see(tmp_path, capfd, monkeypatch):
    watcher = Watcher(tmp_path, Heartbeat(), 2)
    codes = []

    def leave(code):
        codes.append(code)
        raise GaveUpError

    monkeypatch.setattr(os, "_exit", leave)
    for _ in range(10):
        watcher.after(10)
    with pytest.raises(GaveUpError):
        watcher._give_up(watcher._stalled(watcher.now))
    assert codes == [1]
    assert "rank 1 has left no sign of life" in capfd.readouterr().err


def test_a_disk_that_cannot_be_written_is_told_once(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(watch.LOG, "warning", lambda *message: told.append(message))
    watcher = Watcher(tmp_path, Heartbeat(), 1)
    (tmp_path / "heartbeats").rmdir()
    (tmp_path / "heartbeats").write_text("in the way")
    for _ in range(3):
        assert watcher.after(1) == set()
    assert len(told) == 1
    assert "going on without" in told[0][0]


def test_where_heartbeats_cannot_be_written_nobody_is_suspected(tmp_path):
    """A full disk is no reason to end a job that goes on without."""
    watcher = Watcher(tmp_path, Heartbeat(), 2)
    tell(tmp_path, 1)
    assert watcher.after(1) == set()
    for path in (tmp_path / "heartbeats").iterdir():
        path.unlink()
    (tmp_path / "heartbeats").rmdir()
    (tmp_path / "heartbeats").write_text("in the way")
    assert [watcher.after(10) for _ in range(30)] == [set()] * 30
    (tmp_path / "heartbeats").unlink()
    (tmp_path / "heartbeats").mkdir()
    tell(tmp_path, 1)
    assert 1 in [*(watcher.after(10) for _ in range(10))][-1]


def test_what_an_earlier_start_left_is_cleared(tmp_path):
    (tmp_path / "heartbeats").mkdir()
    tell(tmp_path, 7)
    clear_heartbeats(tmp_path)
    assert not list((tmp_path / "heartbeats").iterdir())
    clear_heartbeats(tmp_path / "nowhere")


def test_names_of_samples_are_asked_for_once_a_second_at_most():
    heartbeat, asked = Heartbeat(), []

    def name() -> str:
        asked.append(1)
        return "key"

    for _ in range(1000):
        heartbeat.beat(step=1, sample=name)
    assert len(asked) == 1
    assert heartbeat.describe()["sample"] == "key"
    assert heartbeat.progress == 1000


def test_a_sample_that_cannot_be_named_is_left_out():
    heartbeat = Heartbeat()

    def name() -> str:
        raise DataError("its shard is out of reach")

    heartbeat.beat(step=1, sample=name)
    assert heartbeat.describe()["sample"] is None
    assert heartbeat.progress == 1


@pytest.mark.parametrize("are_remote", [False, True])
def test_remote_data_may_take_any_time(are_remote):
    heartbeat, seen = Heartbeat(), []

    def items() -> Iterator[int]:
        for item in range(2):
            seen.append(heartbeat.describe())
            yield item

    for item in heartbeat.while_fetching(items(), are_remote=are_remote):
        assert seen[item]["open_ended"] is are_remote
        assert not heartbeat.is_open_ended
    assert len(seen) == 2
