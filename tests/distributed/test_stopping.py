"""A stop request is obeyed by all ranks together, soon, and loses nothing; a second one at once."""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from grids import one_of_each
from killed_runs import At, Exit, require_done, run_ranks
from tiny_runs import make_dataset, require_equal_runs, results, tiny_config, write_config

from rtl_dist.distributed.stopping import StopRequests
from rtl_dist.evaluation.logits import logits_from_images
from rtl_dist.training.begin import open_data
from rtl_dist.training.stage_trainer import StageTrainer

pytestmark = pytest.mark.launch

MICROBATCH = (
    StageTrainer.learn_from  # 4 a step, shared by the ranks
)
STEP = StageTrainer.step
IMAGES = logits_from_images
OPEN = open_data


@dataclass(frozen=True, kw_only=True)
class Ask(At):
    """Signals come one after the other, ``apart_s`` apart, while this place is held for ``hold_s``.

    The signals are sent by another thread: the main one may be waiting for another rank.
    """

    signals: tuple[str, ...] = ("SIGTERM",)
    apart_s: float = 0.0
    hold_s: float = 0.0

    def happen(self) -> None:
        def send() -> None:
            for name in self.signals:
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(self.apart_s)

        if self.hold_s:
            threading.Thread(target=send, daemon=True).start()
            time.sleep(self.hold_s)
        else:
            send()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """With three blocks of validation images."""
    return make_dataset(tmp_path_factory.mktemp("data"), val=150)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> dict[int, Path]:
    """The run by number of processes."""
    runs = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"undisturbed-{world_size}")
        config = write_config(folder / "c.yaml", tiny_config(dataset, folder / "run", **CHANGES))
        require_done(run_ranks(config, world_size=world_size))
        runs[world_size] = folder / "run"
    return runs


CHANGES = {"run__ledger": True, "optim": {"ema": 0.9}}


@pytest.fixture
def config(dataset, tmp_path) -> str:
    return write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run", **CHANGES))


def require_stopped(exits: list[Exit], fault: At) -> None:
    assert exits[fault.rank].fired, exits[fault.rank].output
    for one in exits:
        assert one.code == 75, one.output
        assert "Traceback" not in one.output
    assert "start the same command" in exits[0].last_line


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_one_process_stops_between_two_microbatches(config, tmp_path, undisturbed, name):
    """Of step 9 (BatchNorm learns, no save is due) the second microbatch is the last computed."""
    fault = Ask(place=MICROBATCH, call=9 * 4 + 2, signals=(name,))
    exits = run_ranks(config, fault=fault)
    require_stopped(exits, fault)
    assert f"stopped at step 9 by {name} and saved" in exits[0].last_line
    assert results(tmp_path / "run")["steps"] == 9
    require_done(run_ranks(config))
    require_equal_runs(undisturbed[1], tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_where_one_is_asked(config, tmp_path, undisturbed, rank):
    fault = Ask(place=STEP, call=8, rank=rank)
    exits = run_ranks(config, world_size=2, fault=fault)
    require_stopped(exits, fault)
    assert results(tmp_path / "run")["steps"] in (7, 8)
    require_done(run_ranks(config, world_size=2))
    require_equal_runs(undisturbed[2], tmp_path / "run")


@pytest.mark.parametrize("rank", one_of_each([0, 1]))
def test_all_ranks_leave_an_evaluation_where_one_is_asked(config, tmp_path, rank):
    """Before its second block: the first is scored and thrown away."""
    fault = Ask(place=IMAGES, item=1, rank=rank)
    exits = run_ranks(config, "stages.0.cache=off", world_size=2, fault=fault)
    require_stopped(exits, fault)
    run = tmp_path / "run"
    assert not any("val/top1" in line for line in (run / "metrics.jsonl").read_text().splitlines())


def test_an_evaluation_that_was_left_is_done_again(config, tmp_path, undisturbed):
    fault = Ask(place=IMAGES, item=2, call=2)
    require_stopped(run_ranks(config, world_size=1, fault=fault), fault)
    require_done(run_ranks(config))
    require_equal_runs(undisturbed[1], tmp_path / "run")


def test_a_second_request_leaves_at_once_and_harms_nothing(config, tmp_path, undisturbed):
    """The process is held for a minute, which it would have to wait for to save."""
    fault = Ask(place=STEP, call=7, signals=("SIGTERM", "SIGTERM"), apart_s=1.2, hold_s=60.0)
    began_at = time.monotonic()
    (one,) = run_ranks(config, fault=fault)
    assert one.fired
    assert time.monotonic() - began_at < 30
    assert one.code == 75
    assert "left at once (SIGTERM); start the same command again" in one.last_line
    assert not (tmp_path / "run" / "results.json").exists()
    require_done(run_ranks(config))
    require_equal_runs(undisturbed[1], tmp_path / "run")


@pytest.mark.parametrize(
    ("signals", "apart_s"),
    [(("SIGINT", "SIGINT"), 0.1), (("SIGUSR1", "SIGUSR1"), 1.2)],
    ids=["a launcher passes on what came anyway", "a scheduler asks again"],
)
def test_the_same_request_twice_is_one(config, tmp_path, signals, apart_s):
    fault = Ask(place=STEP, call=7, signals=signals, apart_s=apart_s, hold_s=2.5)
    exits = run_ranks(config, fault=fault)
    require_stopped(exits, fault)
    assert "and saved" in exits[0].last_line
    assert results(tmp_path / "run")["status"] == "stopped"


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_before_there_is_anything_to_save_a_request_is_obeyed_at_once(config, tmp_path, world_size):
    fault = Ask(place=OPEN, hold_s=60.0)
    exits = run_ranks(config, world_size=world_size, fault=fault)
    assert exits[0].fired
    assert exits[0].code == 75, exits[0].output
    assert "left at once (SIGTERM)" in exits[0].last_line
    assert not (tmp_path / "run" / "checkpoints").exists()
    require_done(run_ranks(config, world_size=world_size))


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_time_limit(config, tmp_path, undisturbed, world_size):
    exits = run_ranks(
        config, "run.time_limit=1 second", world_size=world_size, fault=Ask(place=STEP, call=3,
        signals=(), hold_s=1.1)
    )  # fmt: skip
    assert [one.code for one in exits] == [75] * world_size, exits[0].output
    assert "by run.time_limit and saved" in exits[0].last_line
    state = results(tmp_path / "run")
    assert state["steps"] < 20
    require_done(run_ranks(config, world_size=world_size))
    require_equal_runs(undisturbed[world_size], tmp_path / "run")


def test_the_clock_may_jump(config, tmp_path, undisturbed):
    """By days, both ways, at every look at it."""
    require_done(run_ranks(config, "run.time_limit=1 hour", fault=JumpingClock(place=OPEN)))
    require_equal_runs(undisturbed[1], tmp_path / "run")
    elapsed = [json.loads(line)["elapsed_s"] for line in
               (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] < 3600


@dataclass(frozen=True, kw_only=True)
class JumpingClock(At):
    def happen(self) -> None:
        true, looks = time.time, iter(range(10**9))
        time.time = lambda: true() + 86400 * (1 if next(looks) % 2 else -3)


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stops, stops.deferred():
        assert signal.getsignal(signal.SIGTERM) != before
        assert stops.reason is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stops.reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
