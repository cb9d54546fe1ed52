"""What goes wrong with data in a run of two processes ends both, together, with the same words."""

import json
import multiprocessing
import os
import re
import signal
from dataclasses import dataclass

import pytest
from killed_runs import At, Exit, run_ranks
from small_sets import order_of
from tiny_runs import damage, make_dataset, tiny_config, write_config

from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.training.stage_trainer import StageTrainer

pytestmark = pytest.mark.launch
STEP = StageTrainer.step


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def long_run(dataset, folder, **changes):
    """A config of one stage, far longer than a test may last."""
    stages = [{"name": "all", "steps": 100_000, "trainable": "all", "lr": 1e-3}]
    changes = {"stages": stages, "batch__global": 8, "eval__every": "100000 steps"} | changes
    changes |= {"checkpoint__every": "100000 steps"}
    return write_config(folder / "config.yaml", tiny_config(dataset, folder / "run", **changes))


def last_words(exits: list[Exit]) -> str:
    """What all of them say, which is the same."""
    (said,) = {
        next(line for line in reversed(one.output.splitlines()) if line.startswith("rtl-dist:"))
        for one in exits
    }
    return said


@dataclass(frozen=True, kw_only=True)
class KillWorker(At):
    """SIGKILL for the loader's process."""

    def happen(self) -> None:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class EmptyShard(At):
    """A shard that loses all it holds."""

    path: str

    def happen(self) -> None:
        os.truncate(self.path, 0)


def test_a_killed_worker_of_one_rank_ends_both(dataset, tmp_path):
    config = long_run(dataset, tmp_path, data__workers=1)
    exits = run_ranks(config, world_size=2, fault=KillWorker(place=STEP, call=8, rank=1))
    assert exits[1].fired
    assert [one.code for one in exits] == [1, 1], exits
    worker = re.search(r"loader process \d+ was killed", last_words(exits))
    assert worker, last_words(exits)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "failed"
    assert worker[0] in results["reason"]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_damaged_sample_too_many_ends_both_at_the_same_step(tmp_path, workers):
    (tmp_path / "data").mkdir()
    damaged = make_dataset(tmp_path / "data")
    samples = order_of(open_dataset(damaged).split("train"), seed=5).samples_at(0, 48)[0]
    budget_spent_by, over_at = int(samples[9]), int(samples[27])  # steps 1 and 3 of 8 images
    damage(damaged, "train", budget_spent_by)
    damage(damaged, "train", over_at)
    config = long_run(damaged, tmp_path, data__workers=workers, data__bad_samples=1)
    exits = run_ranks(config, world_size=2)
    assert [one.code for one in exits] == [3, 3], exits
    assert f"sample {over_at} of split 'train'" in last_words(exits)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 4
    assert results["bad_samples"]["count"] == 2
    assert [
        f"sample {n} " in name
        for n, name in zip((budget_spent_by, over_at), results["bad_samples"]["names"], strict=True)
    ] == [True, True]


def test_a_shard_lost_in_mid_run_ends_both(tmp_path):
    """A whole shard is no damaged sample: the budget does not cover it."""
    damaged = make_dataset(tmp_path / "data")
    config = long_run(damaged, tmp_path, data__workers=0, data__bad_samples=1000)
    shard = open_dataset(damaged).split("train").shard_path(0)
    exits = run_ranks(config, world_size=2, fault=EmptyShard(place=STEP, call=5, path=str(shard)))
    assert [one.code for one in exits] == [3, 3], exits
    assert shard.name in last_words(exits)
