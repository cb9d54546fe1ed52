"""A SLURM cluster on this machine, and the jobs that tests submit to it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from launched_runs import ROOT, environment

SCRIPT = str(Path(__file__).with_name("slurm_cluster.sh"))
TIMEOUT_S = 180  # for what takes seconds
POLL_S = 0.2
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def wait_until(found: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not found():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {TIMEOUT_S} s: {what()}")
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Cluster:
    """folder: the cluster's own. project: where jobs are submitted, as from the project's root."""

    folder: Path
    project: Path

    def on(self, host: str, *command: str, check: bool = True) -> str:
        """What a command on one of the hosts prints."""
        return subprocess.run(
            ["bash", SCRIPT, "in", str(self.folder), host, *command],
            cwd=self.project,
            env=environment(CUDA_VISIBLE_DEVICES=""),
            capture_output=True,
            text=True,
            check=check,
            timeout=TIMEOUT_S,
        ).stdout.strip()

    def submit(self, *arguments: str) -> Job:
        return Job(self, self.on("login", "sbatch", "--parsable", *arguments))

    def crash(self, node: str) -> None:
        subprocess.run(["bash", SCRIPT, "crash", str(self.folder), node], check=True, timeout=60)

    def boot(self, node: str) -> None:
        subprocess.run(["bash", SCRIPT, "boot", str(self.folder), node], check=True, timeout=60)

    def wait_until_idle(self) -> None:
        """Until the last job has left every node."""
        nodes = ["sinfo", "-h", "-N", "-p", "batch", "-o", "%T"]
        wait_until(
            lambda: set(self.on("login", *nodes).split()) == {"idle"},
            lambda: self.on("login", "sinfo", "-N", "-p", "batch"),
        )

    def state_of(self, node: str) -> str:
        return self.on("login", "sinfo", "-h", "-n", node, "-p", "batch", "-o", "%T")


@dataclass(frozen=True)
class Job:
    """name: the job's number; ``number_task`` for a task of an array."""

    cluster: Cluster
    name: str

    def task(self, number: int) -> Job:
        return Job(self.cluster, f"{self.name}_{number}")

    @property
    def facts(self) -> dict[str, str]:
        """What SLURM says of the job."""
        shown = self.cluster.on("login", "scontrol", "show", "job", "-o", self.name, check=False)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    @property
    def state(self) -> str:
        return self.facts.get("JobState", "")

    @property
    def output(self) -> str:
        path = self.cluster.project / f"slurm-{self.name}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, state: str) -> dict[str, str]:
        """What SLURM says of the job when it is in this state, which it must reach."""
        facts: dict[str, str] = {}

        def reached() -> bool:
            facts.update(self.facts)
            now = facts.get("JobState", "")
            if now != state and now in ENDED:
                pytest.fail(f"job {self.name} is {now}, not {state}: {facts}\n{self.output}")
            return now == state

        wait_until(reached, lambda: f"job {self.name} {state}: {facts}\n{self.output}")
        return facts

    def wait_for(self, found: Callable[[], bool]) -> None:
        """Waits until ``found``, which must be before the job ends."""

        def reached() -> bool:
            if found():
                return True
            assert self.state not in ENDED, f"job {self.name} has ended:\n{self.output}"
            return False

        wait_until(reached, lambda: f"job {self.name}: {self.facts}\n{self.output}")

    def wait_for_output(self, text: str) -> None:
        self.wait_for(lambda: text in self.output)

    def cancel(self) -> None:
        self.cluster.on("login", "scancel", self.name)

    def ask_to_requeue(self) -> None:
        """As the scripts tell their users to."""
        self.cluster.on("login", "scancel", "--signal=USR1", "--batch", self.name)


@contextmanager
def running_cluster(folder: Path, num_nodes: int) -> Iterator[Cluster]:
    """Skips the test where there can be no cluster; takes it down whatever happens."""
    try:
        probe = subprocess.run(
            ["bash", SCRIPT, "probe"], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        pytest.skip("needs bash")
    if probe.returncode:
        assert probe.stdout, f"the probe itself failed: {probe.stderr}"
        pytest.skip(f"SLURM on this machine needs {probe.stdout.strip()}")
    project = folder / "project"
    make_project(project)
    log = folder / "cluster.log"
    # what lies under /tmp and is to be seen by all hosts: code, environment, and the test's folder
    shared = [
        path for path in (ROOT, sys.prefix, sys.base_prefix, folder.parent) if is_in_tmp(path)
    ]
    with log.open("w") as errors:
        process = subprocess.Popen(
            ["bash", SCRIPT, "up", str(folder / "cluster"), str(num_nodes), *map(str, shared)],
            stdin=subprocess.PIPE,  # the cluster ends with it, and it with this process
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", log.read_text()
        yield Cluster(folder / "cluster", project)
    finally:
        process.communicate(timeout=60)


def make_project(project: Path) -> None:
    """A folder that is to SLURM what the project's root is to a user: scripts, code and .venv."""
    (project / ".venv" / "bin").mkdir(parents=True)
    for name in ("slurm", "rtl_dist"):
        (project / name).symlink_to(ROOT / name)
    activate = project / ".venv" / "bin" / "activate"
    activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')


def is_in_tmp(path: str | Path) -> bool:
    return Path("/tmp") in Path(path).resolve().parents
