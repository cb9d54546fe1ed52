"""What goes wrong with data in a run of two processes ends both, together, with the same words."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from launched_runs import finish, start_ranks
from small_sets import order_of
from tiny_runs import damage, make_dataset, tiny_config, write_config

from rtl_dist.data.format.dataset import open_dataset

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def long_run(dataset, folder, **changes):
    """A config of one stage, far longer than a test may last."""
    stages = [{"name": "all", "steps": 100_000, "trainable": "all", "lr": 1e-3}]
    changes = {"stages": stages, "batch__global": 8, "eval__every": "100000 steps"} | changes
    changes |= {"checkpoint__every": "100000 steps"}
    return write_config(folder / "config.yaml", tiny_config(dataset, folder / "run", **changes))


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def last_words(outputs: list[str]) -> list[str]:
    return [
        next(line for line in reversed(output.splitlines()) if line.startswith("rtl-dist:"))
        for output in outputs
    ]


def test_a_killed_worker_of_one_rank_ends_both(dataset, tmp_path):
    config = long_run(dataset, tmp_path, data__workers=1)
    ranks = start_ranks(["--config", config], 2)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, [finish(rank) for rank in ranks]
        time.sleep(0.1)
    (victim,) = children_of(ranks[1].pid)
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    codes, outputs = zip(*(finish(rank) for rank in ranks), strict=True)
    assert time.monotonic() - killed_at < 60
    assert codes == (1, 1), outputs
    first, second = last_words(outputs)
    assert first == second
    assert f"loader process {victim} was killed" in first
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "failed"
    assert f"loader process {victim}" in results["reason"]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_damaged_sample_too_many_ends_both_at_the_same_step(dataset, tmp_path, workers):
    (tmp_path / "data").mkdir()
    damaged = make_dataset(tmp_path / "data")
    samples = order_of(open_dataset(damaged).split("train"), seed=5).samples_at(0, 48)[0]
    budget_spent_by, over_at = int(samples[9]), int(samples[27])  # steps 1 and 3 of 8 images
    damage(damaged, "train", budget_spent_by)
    damage(damaged, "train", over_at)
    config = long_run(damaged, tmp_path, data__workers=workers, data__bad_samples=1)
    ranks = start_ranks(["--config", config], 2)
    codes, outputs = zip(*(finish(rank) for rank in ranks), strict=True)
    assert codes == (3, 3), outputs
    first, second = last_words(outputs)
    assert first == second
    assert f"sample {over_at} of split 'train'" in first
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 4
    assert results["bad_samples"]["count"] == 2
    assert [
        f"sample {n} " in name
        for n, name in zip((budget_spent_by, over_at), results["bad_samples"]["names"], strict=True)
    ] == [True, True]


def test_a_shard_lost_in_mid_run_ends_both(dataset, tmp_path):
    """A whole shard is no damaged sample: the budget does not cover it."""
    damaged = make_dataset(tmp_path / "data")
    config = long_run(damaged, tmp_path, data__workers=0, data__bad_samples=1000)
    ranks = start_ranks(["--config", config], 2)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not log.exists():
        assert time.monotonic() < deadline, [finish(rank) for rank in ranks]
        time.sleep(0.05)
    shard = open_dataset(damaged).split("train").shard_path(0)
    os.truncate(shard, 0)
    codes, outputs = zip(*(finish(rank) for rank in ranks), strict=True)
    first, second = last_words(outputs)
    assert (codes, first == second) == ((3, 3), True), outputs
    assert shard.name in first
