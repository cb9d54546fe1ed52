"""Several real processes: the launchers make one group of them, and their number changes nothing.

Starting processes costs some ten seconds of imports, so a few runs are shared by many tests.
"""

import json
import os
import re
import signal
import socket
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from killed_runs import (
    Fault,
    Kill,
    Signal,
    replace_everywhere,
    require_done,
    require_killed,
    run_ranks,
)
from launched_runs import ROOT, SCRIPT, environment, finish, start
from safetensors.torch import load_file
from tiny_runs import make_dataset

import rtl_dist.distributed.runtime
from rtl_dist.distributed.launchers import allow_forks, first_host, launched_world_size
from rtl_dist.distributed.precision import resolve_precision
from rtl_dist.train import main
from rtl_dist.training.stage_trainer import StageTrainer
from rtl_dist.training.step_boundary import StepBoundary

pytestmark = pytest.mark.launch

LAUNCH_FILES = sorted((ROOT / "launch").glob("*.yaml"))
NUM_STEPS = 24
NUM_VAL, NUM_TEST = 150, 15  # neither divides into equal batches


# --- the runs ---


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """Three stages, 24 steps of 32 images in 4 microbatches, with all that could depend on how the
    microbatches are shared: BatchNorm, dropout, mixup, an average of the weights."""
    folder = tmp_path_factory.mktemp("launch")
    content = {
        "seed": 3,
        "run": {"ledger": True},
        "data": {
            "path": str(make_dataset(folder, val=NUM_VAL)),
            "image_size": 16,
            "crop_pct": 1.0,
            "workers": 0,
        },
        "augment": {"crop_scale": [0.7, 1.0], "mixup": 0.2},
        "model": {"name": "basic_cnn", "weights": "none", "dropout": 0.1},
        "stages": [
            {"name": "head", "steps": 6, "trainable": "head", "lr": 1e-2, "views": 2},
            {
                "name": "top",
                "steps": 8,
                "trainable": ["layer3", "head"],
                "lr": 3e-3,
                "batchnorm": "train",
            },
            {"name": "all", "steps": 10, "trainable": "all", "lr": 3e-3, "batchnorm": "train"},
        ],
        "optim": {"ema": 0.9},
        "batch": {"global": 32, "micro": 8},
        "precision": "fp64",
        "checkpoint": {"every": "9 steps"},
        "track": {"wandb": "off"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@dataclass(frozen=True)
class Outcome:
    run: Path
    output: str
    num_steps: int = NUM_STEPS

    @property
    def results(self) -> dict:
        return json.loads((self.run / "results.json").read_text())

    @property
    def evaluations(self) -> list[dict]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "val/top1" in row]

    @property
    def ledger(self) -> bytes:
        return (self.run / "ledger" / "samples.jsonl").read_bytes()

    def tensors(self, name: str) -> dict:
        (checkpoint,) = (self.run / "checkpoints").glob(f"step-*{self.num_steps}")
        return load_file(checkpoint / f"{name}.safetensors")


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Outcome:
    run = tmp_path_factory.mktemp("alone") / "run"
    require_done(run_ranks(config, f"run.dir={run}"))
    return Outcome(run, "")


@pytest.fixture(scope="module")
def launched(config, tmp_path_factory):
    """The outcome of two processes started by a launcher; each launcher runs once."""
    binaries = Path(sys.executable).parent
    launchers = {
        "torchrun": [str(binaries / "torchrun"), "--standalone", "--nproc_per_node", "2"],
        "accelerate": [
            str(binaries / "accelerate"),
            "launch",
            "--config_file",
            str(ROOT / "launch" / "cpu.yaml"),
        ],
    }
    outcomes: dict[str, Outcome] = {}

    def outcome(launcher: str) -> Outcome:
        if launcher not in outcomes:
            run = tmp_path_factory.mktemp(launcher) / "run"
            arguments = [SCRIPT, "--config", config, f"run.dir={run}"]
            _, output = finish(start([*launchers[launcher], *arguments], environment()))
            outcomes[launcher] = Outcome(run, output)
        assert (outcomes[launcher].run / "results.json").exists(), outcomes[launcher].output
        return outcomes[launcher]

    return outcome


def largest_difference(one: Outcome, other: Outcome, name: str) -> float:
    mine, theirs = one.tensors(name), other.tensors(name)
    assert mine.keys() == theirs.keys()
    return max(float((mine[k].double() - theirs[k].double()).abs().max()) for k in mine)


# --- one group, the same result ---


@pytest.mark.parametrize(
    "launcher", [pytest.param("torchrun", marks=pytest.mark.exhaustive), "accelerate"]
)
class TestTwoProcesses:
    def test_they_are_one_group(self, launcher, launched):
        outcome = launched(launcher)
        assert "2 process(es)" in outcome.output
        environment = json.loads((outcome.run / "environment.json").read_text())
        assert environment["world_size"] == 2

    def test_they_see_the_samples_of_one_process(self, launcher, launched, alone):
        assert launched(launcher).ledger == alone.ledger
        assert len(alone.ledger.splitlines()) == NUM_STEPS * 4

    def test_they_end_with_the_weights_of_one_process(self, launcher, launched, alone):
        outcome = launched(launcher)
        assert largest_difference(outcome, alone, "model") < 1e-10  # BatchNorm statistics too
        assert largest_difference(outcome, alone, "ema") < 1e-10
        assert outcome.results["frozen_ok"] is True
        assert outcome.results["samples_seen"] == alone.results["samples_seen"] == NUM_STEPS * 32

    def test_they_count_every_evaluated_sample_once(self, launcher, launched, alone):
        outcome = launched(launcher)
        assert outcome.results["test"]["num_samples"] == NUM_TEST
        assert outcome.results["test"] == pytest.approx(alone.results["test"], rel=1e-9)
        assert len(outcome.evaluations) == len(alone.evaluations) >= 3
        for row, expected in zip(outcome.evaluations, alone.evaluations, strict=True):
            assert row["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-9)
            assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-9)
            assert row["val/top1"] == expected["val/top1"]
            assert row["val/top1"] * NUM_VAL == pytest.approx(round(row["val/top1"] * NUM_VAL))


def test_a_stop_request_to_one_rank_stops_all_and_one_process_goes_on(config, alone, tmp_path):
    run = tmp_path / "run"
    step = StageTrainer.step
    fault = Signal(place=step, call=11, number=signal.SIGUSR1, rank=1)
    exits = run_ranks(config, f"run.dir={run}", world_size=2, fault=fault)
    assert exits[1].fired
    assert [one.code for one in exits] == [75, 75], exits
    assert "saved; start the same command to go on" in exits[0].output  # rank 0 speaks for all
    assert Outcome(run, "").results["status"] == "stopped"
    require_done(run_ranks(config, f"run.dir={run}"))
    resumed = Outcome(run, "")
    assert resumed.ledger == alone.ledger
    assert largest_difference(resumed, alone, "model") < 1e-10
    assert largest_difference(resumed, alone, "ema") < 1e-10


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [2, 4])
def test_fifty_steps_end_alike_at_any_number_of_processes(config, tmp_path, world_size):
    lengths = ["stages.0.steps=10", "stages.1.steps=20", "stages.2.steps=20"]
    network = ["model.name=test_resnet", "data.image_size=32", "stages.1.trainable=[layer4, head]"]
    outcomes = []
    for count in (1, world_size):
        run = tmp_path / str(count)
        require_done(run_ranks(config, f"run.dir={run}", *network, *lengths, world_size=count))
        outcomes.append(Outcome(run, "", num_steps=50))
    alone, together = outcomes
    assert together.ledger == alone.ledger
    assert largest_difference(together, alone, "model") < 1e-10
    assert largest_difference(together, alone, "ema") < 1e-10


# --- refusals ---


def test_processes_that_cannot_share_the_microbatches_are_refused(config, tmp_path):
    for one in run_ranks(config, f"run.dir={tmp_path / 'run'}", "batch.micro=32", world_size=2):
        assert one.code == 2, one.output
        assert "1 microbatch (global 32 / micro 32) cannot be shared equally by 2" in one.output
        assert "add batch.micro=16 to the command" in one.output


def test_a_run_of_one_process_goes_on_with_two_as_the_refusal_says(config, tmp_path):
    run = f"run.dir={tmp_path / 'run'}"
    kill = Kill(place=StepBoundary.cross, call=20)
    whole = [run, "batch.micro=32"]  # as batch.micro: auto is on one process
    require_killed(run_ranks(config, *whole, fault=kill), kill)
    refused = run_ranks(config, *whole, world_size=2)
    (typed,) = {re.search(r"add (\S+) to the command", one.last_line)[1] for one in refused}
    assert typed == "batch.micro=16"
    require_done(run_ranks(config, run, typed, world_size=2))
    assert Outcome(tmp_path / "run", "").results["microbatch_halvings"] == [
        {"from_step": 18, "micro": 16}
    ]


def test_a_process_that_finds_itself_alone_in_a_job_of_two_is_refused(
    config, tmp_path, monkeypatch, capsys
):
    # What accelerate 1.15 does to processes on CPUs that are not told so, and to any without a
    # LOCAL_RANK: each would train alone
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    accelerator = rtl_dist.distributed.runtime.Accelerator
    monkeypatch.setattr(
        rtl_dist.distributed.runtime, "Accelerator", lambda cpu, **others: accelerator(**others)
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--config", config, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "WORLD_SIZE is 2 but this process found 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_without_a_meeting_point_are_refused(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["--config", config, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "MASTER_ADDR" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class OtherHardware(Fault):
    """A rank whose machine computes in bf16."""

    def install(self, mark: int) -> None:
        os.write(mark, b"it has")
        replace_everywhere(resolve_precision, lambda _: lambda wanted, on_gpu: "bf16")


def test_machines_of_several_precisions_are_refused(config, tmp_path):
    run = f"run.dir={tmp_path / 'run'}"
    exits = run_ranks(config, run, "precision=no", world_size=2, fault=OtherHardware(rank=1))
    assert exits[1].fired
    assert [one.code for one in exits] == [2, 2], exits
    for one in exits:
        assert "not the same on all machines (bf16 on " in one.last_line
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(config, tmp_path):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        (one,) = run_ranks(config, f"run.dir={tmp_path / 'run'}", env=env)
    assert one.code == 1, one.output
    assert f"cannot meet the other processes at 127.0.0.1:{port} (" in one.last_line
    assert "Traceback" not in one.output


# --- what srun and the files of launch/ say ---


def test_tasks_of_srun_are_told_their_ranks_without_asking_scontrol(monkeypatch):
    monkeypatch.setenv("PATH", "")  # as in a container
    env = {
        "SLURM_JOB_ID": "40123",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_PROCID": "4",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
    }
    assert launched_world_size(env) == 5
    assert {k: v for k, v in env.items() if not k.startswith("SLURM")} == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "12123",
    }


@pytest.mark.parametrize(("nodes", "first"), [
    ("node7", "node7"), ("a1,a2", "a1"), ("gpu[03-07,12]", "gpu03"), ("gpu[12,3-7],cpu1", "gpu12"),
    ("rack[2-3]n[001-032]", "rack2n001"), ("ip-10-0-1-[7,9]", "ip-10-0-1-7"), ("n[5]-ib,x", "n5-ib"),
])  # fmt: skip
def test_the_first_of_slurm_s_nodes(nodes, first):
    assert first_host(nodes) == first


def test_forks_are_allowed_where_nobody_said_otherwise():
    env = {"FI_EFA_FORK_SAFE": "0"}
    allow_forks(env)
    assert env == {"FI_EFA_FORK_SAFE": "0", "RDMAV_FORK_SAFE": "1"}


def test_a_launcher_within_srun_has_the_last_word():
    env = {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "8", "RANK": "3", "MASTER_ADDR": "a"}
    before = dict(env)
    assert launched_world_size(env) == 8
    assert env == before


def test_a_batch_script_and_a_shell_are_one_process():
    assert launched_world_size({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) == 1
    assert launched_world_size({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == 1


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_files_are_what_accelerate_reads(path):
    settings = load_config_from_file(str(path))
    assert settings.mixed_precision == "no"  # precision is the training config's to choose
    several = settings.distributed_type.value == "MULTI_GPU"
    assert several == (settings.num_processes > 1) == (path.stem != "one_gpu")
    assert f"--config_file launch/{path.name}" in path.read_text()
