"""Under torchrun's elastic launch a machine may be lost: what is left goes on to the same result."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from launched_runs import ROOT, environment
from safetensors.torch import load_file
from tiny_runs import make_dataset, newest_checkpoint, tiny_config, write_config
from torch import distributed as dist

from rtl_dist.config import BatchConfig, load_config
from rtl_dist.config.recipe import recipe_for
from rtl_dist.core.errors import RtlDistError
from rtl_dist.distributed.elastic import largest_share, meet, num_microbatches, taking_part
from rtl_dist.train import main

STEPS = 90
CHANGES = {
    "batch__global": 12,
    "precision": "fp64",
    "run__ledger": True,
    "checkpoint": {"every": "10 steps"},
    "eval": {"every": "50 steps"},
    "optim": {"ema": 0.9},
    "augment": {"mixup": 0.2},
    "stages": [
        {"name": "head", "steps": 10, "trainable": "head", "lr": 1e-2},
        {"name": "all", "steps": STEPS, "trainable": "all", "lr": 1e-3, "batchnorm": "train"},
    ],
}


class Agents:
    """Several machines, each a launch/elastic.sh of its own; ended with all below them."""

    def __init__(self, count: int, config: str, folder: Path) -> None:
        self.logs = [folder / f"agent-{i}.log" for i in range(count)]
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        env = environment(HOST="localhost", PORT=port, NODES=f"1:{count}", PROCESSES="1")
        # the first keeps the list of members
        self.processes = [self._start(config, env, log) for log in self.logs]

    def _start(self, config: str, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [str(ROOT / "launch" / "elastic.sh"), config],
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if log == self.logs[0]:
            time.sleep(1.0)  # others ask it
        return process

    def crash(self, number: int) -> None:
        """As when its machine loses power."""
        agent = psutil.Process(self.processes[number].pid)
        for process in [agent, *agent.children(recursive=True)]:
            process.kill()
        self.processes[number].wait()

    def said(self) -> str:
        return "\n---\n".join(log.read_text(errors="replace") for log in self.logs)

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, *_: object) -> None:
        for number, process in enumerate(self.processes):
            if process.poll() is None:
                self.crash(number)


def wait_for(condition, agents: Agents, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, agents.said()
        time.sleep(0.05)


@pytest.mark.launch
def test_two_of_three_machines_go_on_as_one_to_the_same_result(tmp_path, monkeypatch):
    """Three microbatches cannot be shared by two: one of them stands by."""
    monkeypatch.setenv("PATH", f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")
    dataset = make_dataset(tmp_path)
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, **CHANGES))
    with Agents(3, config, tmp_path) as agents:
        wait_for(lambda: (run / "checkpoints" / "step-00000030").exists(), agents)
        described = json.loads((run / "environment.json").read_text())
        assert described["world_size"] == 3
        agents.crash(2)
        step = int(newest_checkpoint(run).name.removeprefix("step-"))
        assert step < STEPS, "the run was done before the machine was lost"
        for number in (0, 1):
            wait_for(lambda n=number: agents.processes[n].poll() is not None, agents)
        assert [agents.processes[n].returncode for n in (0, 1)] == [0, 0], agents.said()
        assert "stands by: of 2 only 1 can share the microbatches equally" in agents.said()
    assert json.loads((run / "environment.json").read_text())["world_size"] == 1
    assert json.loads((run / "results.json").read_text())["status"] == "done"

    alone = tmp_path / "alone"
    assert main(["--config", config, f"run.dir={alone}"]) == 0
    for name in ("model", "optimizer", "ema"):
        mine, theirs = (
            load_file(newest_checkpoint(r) / f"{name}.safetensors") for r in (run, alone)
        )
        assert mine.keys() == theirs.keys()
        assert max(float((mine[k].double() - theirs[k].double()).abs().max()) for k in mine) < 1e-10
    ledgers = [(r / "ledger" / "samples.jsonl").read_bytes() for r in (run, alone)]
    assert ledgers[0] == ledgers[1]


def test_usage():
    told = subprocess.run(
        [str(ROOT / "launch" / "elastic.sh")],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "HOST"},
    )
    assert told.returncode == 2
    assert "usage: HOST=machine launch/elastic.sh" in told.stderr


# --- meeting in a store that holds what others left there ---


def names_of(store, world_size: int) -> list[str]:
    found: dict[int, str] = {}

    def join(rank: int) -> None:
        found[rank] = meet(store, rank=rank, world_size=world_size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in reversed(threads):
        thread.start()
        time.sleep(0.12)  # the first rank comes last
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(world_size)]


def test_each_meeting_has_a_name_of_its_own_known_to_all():
    store = dist.HashStore()
    meetings = [names_of(store, size) for size in (3, 3, 2, 4)]
    assert [len(set(names)) for names in meetings] == [1, 1, 1, 1]
    assert len({names[0] for names in meetings}) == 4


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever():
    with pytest.raises(RtlDistError, match="not all 2 processes came within"):
        meet(dist.HashStore(), rank=0, world_size=2, timeout_s=0.2)


@pytest.mark.parametrize(
    ("microbatches", "there_are", "train"),
    [(8, 8, 8), (8, 7, 4), (8, 3, 2), (6, 5, 3), (7, 6, 1), (4, 16, 4), (1, 3, 1)],
)
def test_how_many_train(microbatches, there_are, train):
    assert largest_share(microbatches, there_are) == train


@pytest.mark.parametrize("num_images", [100, 20_000])
@pytest.mark.parametrize("micro", ["auto", 1, 8, 10, 12, 24, 32, 48, 64])
def test_a_batch_that_is_chosen_later_can_be_shared(micro, num_images):
    microbatches = num_microbatches(BatchConfig(global_="auto", micro=micro))
    assert microbatches >= 1
    batch = recipe_for([], num_images, micro=micro).batch
    for there_are in range(1, 9):
        train = largest_share(microbatches, there_are)
        assert batch // (1 if micro == "auto" else micro) % train == 0


def test_without_elastic_launch_nothing_is_changed(tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path, tmp_path / "run"))
    env = {"WORLD_SIZE": "3", "RANK": "2", "TORCHELASTIC_MAX_RESTARTS": "0"}
    before = dict(env)
    with taking_part(load_config(config, []).batch, env) as trains:
        assert trains
    assert env == before


def test_signals_are_the_same():
    """What launch/elastic.sh has torchrun pass on is what a run understands."""
    text = (ROOT / "launch" / "elastic.sh").read_text()
    handled = text.split("--signals-to-handle=")[1].split()[0].split(",")
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(handled)
    assert all(hasattr(signal, name) for name in handled)
