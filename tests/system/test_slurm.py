"""The batch scripts on a real SLURM: what they start, and what they make of preemption, requests,
lost nodes and mistakes. Every run that was disturbed must end as one that was not.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launched_runs import SCRIPT, environment
from slurm_jobs import TIMEOUT_S, Job, running_cluster
from tiny_runs import metric_rows, newest_checkpoint, results, weights

from rtl_dist.prepare.packing.pack import pack

pytestmark = [pytest.mark.launch, pytest.mark.slurm]

NUM_STEPS = 160  # an epoch is 78.6 of them, so that none ends one
MICROBATCHES = 4
FAULT_STEP = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("slurm"), num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_job_stays(cluster):
    yield
    cluster.on("login", "scancel", "--user=root")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("config")
    pack("digits", folder / "digits", workers=1, show_progress=False)
    content = {
        "seed": 3,
        "run": {"ledger": True, "log_every": "25 steps"},
        "data": {"path": str(folder / "digits"), "image_size": 16, "crop_pct": 1.0, "workers": 0},
        "model": {"name": "basic_cnn", "weights": "none", "dropout": 0.1},
        "stages": [
            {"name": "head", "steps": 10, "trainable": "head", "lr": 1e-2},
            {
                "name": "all",
                "steps": NUM_STEPS - 10,
                "trainable": "all",
                "lr": 3e-3,
                "batchnorm": "train",
            },
        ],
        "optim": {"ema": 0.9},
        "batch": {"global": 16, "micro": 16 // MICROBATCHES},
        "precision": "fp64",
        "checkpoint": {"every": "40 steps"},
        "eval": {"every": f"{NUM_STEPS} steps"},
        "track": {"wandb": "off"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def alone(cluster, config, tmp_path_factory) -> Path:
    """The run of one process, without SLURM."""
    run = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run(
        [sys.executable, SCRIPT, "--config", config, f"run.dir={run}"],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        check=True,
        timeout=TIMEOUT_S,
    )
    return run


@pytest.fixture(scope="module")
def undisturbed(cluster, config, tmp_path_factory) -> Path:
    """The run of two nodes."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    job = cluster.submit("slurm/multi_node.sbatch", config, f"run.dir={run}")
    facts = job.wait("COMPLETED")
    assert facts["NumNodes"] == "2"
    assert facts["Restarts"] == "0"
    assert "2 process(es)" in job.output
    return run


# --- what is compared ---


def ledger(run: Path) -> bytes:
    return (run / "ledger" / "samples.jsonl").read_bytes()


def steps_taken(run: Path) -> int:
    path = run / "ledger" / "samples.jsonl"
    return path.read_bytes().count(b"\n") // MICROBATCHES if path.exists() else 0


def wait_until_in_mid_run(job: Job, run: Path) -> None:
    job.wait_for(lambda: steps_taken(run) >= FAULT_STEP)


def stops(job: Job) -> list[int]:
    """The steps at which the job was stopped and saved; each of its processes says so."""
    return sorted({int(step) for step in re.findall(r"stopped at step (\d+)", job.output)})


def assert_same_run(run: Path, expected: Path) -> None:
    """To the byte: samples, weights, averages, optimizer; and every row of metrics once."""
    assert ledger(run) == ledger(expected)
    for name in ("model", "ema", "optimizer"):
        file = f"{name}.safetensors"
        mine, theirs = newest_checkpoint(run) / file, newest_checkpoint(expected) / file
        assert mine.read_bytes() == theirs.read_bytes(), name
    assert metric_rows(run) == metric_rows(expected)
    assert results(run)["test"] == results(expected)["test"]
    assert results(run)["status"] == "done"


# --- what the scripts start ---


def test_two_nodes_train_what_one_process_does(undisturbed, alone):
    assert json.loads((undisturbed / "environment.json").read_text())["world_size"] == 2
    assert len(ledger(alone).splitlines()) == NUM_STEPS * MICROBATCHES
    assert ledger(undisturbed) == ledger(alone)
    for name in ("model", "ema"):
        mine, theirs = weights(undisturbed, name), weights(alone, name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert float((tensor.double() - theirs[key].double()).abs().max()) < 1e-10, key
    assert results(undisturbed)["test"] == pytest.approx(results(alone)["test"], rel=1e-9)
    for row, expected in zip(metric_rows(undisturbed), metric_rows(alone), strict=True):
        assert row.pop("stage") == expected.pop("stage")
        assert row == pytest.approx(expected, rel=1e-9)


# --- what they make of faults ---


# without a grace time SLURM requeues by itself, as it does when a node is lost
@pytest.mark.parametrize(
    "partition", ["grace", pytest.param("batch", marks=pytest.mark.exhaustive)]
)
def test_a_preempted_run_goes_on(partition, cluster, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    cluster.wait_until_idle()  # it takes what is free
    job = cluster.submit(
        f"--partition={partition}",
        "--nodes=1-3",
        "slurm/preemptible.sbatch",
        config,
        f"run.dir={run}",
    )
    wait_until_in_mid_run(job, run)
    urgent = cluster.submit(
        "--partition=urgent", "--exclusive", "--nodelist=node1", "--wrap=sleep 600"
    )
    urgent.wait("RUNNING")
    facts = job.wait("COMPLETED")  # beside it, on the nodes that are left
    assert urgent.state == "RUNNING"
    assert facts["Restarts"] == "1"
    assert facts["NodeList"] == "node[2-3]"
    assert "start 0: using 2 of 3 node(s)" in job.output
    assert "start 1: using 2 of 2 node(s)" in job.output
    (stopped_at,) = stops(job)
    assert FAULT_STEP <= stopped_at < NUM_STEPS
    # with a grace time it is the script that must requeue the job, without one SLURM does
    assert ("requeueing job" in job.output) == (partition == "grace")
    assert_same_run(run, undisturbed)


# node1 runs the batch script, which goes with it
@pytest.mark.parametrize("node", [pytest.param("node1", marks=pytest.mark.exhaustive), "node2"])
def test_a_run_that_lost_a_node_goes_on(node, cluster, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit(
        "--nodelist=node[1-2]", "slurm/multi_node.sbatch", config, f"run.dir={run}"
    )
    wait_until_in_mid_run(job, run)
    cluster.crash(node)
    assert steps_taken(run) < NUM_STEPS
    job.wait_for(lambda: cluster.state_of(node).startswith("down"))
    cluster.boot(node)
    facts = job.wait("COMPLETED")
    assert facts["Restarts"] == "1"
    assert stops(job) == []  # nobody could save
    assert_same_run(run, undisturbed)


def test_a_job_that_is_cancelled_stays_cancelled(cluster, config, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit("--gpus-per-node=2", "slurm/one_node.sbatch", config, f"run.dir={run}")
    wait_until_in_mid_run(job, run)
    job.cancel()
    facts = job.wait("CANCELLED")
    assert facts["Restarts"] == "0"
    assert stops(job)
    assert "2 process(es)" in job.output  # one per GPU of the node
    assert results(run)["status"] == "stopped"


def test_a_mistake_is_not_tried_again(cluster, config, tmp_path):
    job = cluster.submit("slurm/one_node.sbatch", config, f"run.dir={tmp_path}", "sed=1")
    facts = job.wait("FAILED")
    assert facts["ExitCode"] == "2:0"
    assert facts["Restarts"] == "0"
    assert "unknown key sed; did you mean seed?" in job.output


# --- sweeps ---


def test_each_task_of_a_sweep_trains_with_its_line(cluster, config, alone, tmp_path):
    lines = tmp_path / "overrides.txt"
    lines.write_text('# seeds\n\nseed=4\n seed=3 "checkpoint.every=30 steps" \n')
    runs = tmp_path / "runs"
    sweep = cluster.submit(
        "--array=0-1", "slurm/sweep.sbatch", config, str(lines), f"run.dir={runs}"
    )
    # its job number is that of the whole array, which must not be requeued with it
    last = sweep.task(1)
    wait_until_in_mid_run(last, runs / "1")
    assert last.facts["JobId"] == sweep.name
    last.ask_to_requeue()
    facts = last.wait("COMPLETED")
    assert facts["Restarts"] == "1"
    assert len(stops(last)) == 1
    assert sweep.task(0).wait("COMPLETED")["Restarts"] == "0"
    for task, seed, every in [(0, 4, "40 steps"), (1, 3, "30 steps")]:
        resolved = yaml.safe_load((runs / str(task) / "config.yaml").read_text())
        assert resolved["seed"] == seed
        assert resolved["checkpoint"]["every"] == every
        assert results(runs / str(task))["status"] == "done"
    assert_same_run(runs / "1", alone)
    assert ledger(runs / "0") != ledger(alone)


def test_a_task_without_a_line_ends_with_one_that_says_so(cluster, config, tmp_path):
    lines = tmp_path / "overrides.txt"
    lines.write_text("seed=4\nseed=5\n")
    job = cluster.submit(
        "--array=2", "slurm/sweep.sbatch", config, str(lines), f"run.dir={tmp_path}"
    )
    task = job.task(2)
    facts = task.wait("FAILED")
    assert facts["ExitCode"] == "2:0"
    assert facts["Restarts"] == "0"
    assert task.output == (
        f"sweep.sbatch: {lines} holds 2 line(s) of overrides, none for task 2:"
        " the first is task 0\n"
    )
