"""One job in a run folder: a second one leaves soon and names the first."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ROOT, tiny_config, write_config

from rtl_dist.core.errors import UserError
from rtl_dist.core.lock import RunLock, require_unlocked
from rtl_dist.distributed.launchers import may_end_alone

HOLD = """
import sys, time
from pathlib import Path
from rtl_dist.core.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def owner_of(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def held(tmp_path):
    """A run folder that another process has, and that process."""
    run = tmp_path / "run"
    run.mkdir()
    process = owner_of(run)
    yield run, process
    process.kill()
    process.communicate()


def test_the_owner_is_named(held):
    run, process = held
    for take in (RunLock(run).acquire, lambda: require_unlocked(run)):
        with pytest.raises(UserError, match=f"in use by process {process.pid} on .+ since 20") as e:
            take()
        assert "choose another run.dir" in str(e.value)


def test_a_lock_whose_owner_was_killed_is_free(held):
    run, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    require_unlocked(run)
    lock = RunLock(run)
    lock.acquire()
    assert f"process {os.getpid()} " in (run / ".lock").read_text()
    lock.release()


def test_an_owner_that_is_just_ending_is_waited_for(held):
    run, process = held
    os.kill(process.pid, signal.SIGKILL)  # it takes a moment to be gone
    lock = RunLock(run)
    lock.acquire()
    lock.release()


@pytest.mark.launch
def test_a_second_job_leaves_before_it_imports_anything_heavy(held, tmp_path):
    """So it is gone within seconds on any machine: here torch cannot even be imported."""
    run, process = held
    (tmp_path / "fake" / "torch").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text("raise ImportError('too late')")
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "nothing", run))
    done = subprocess.run(
        [sys.executable, str(ROOT / "rtl_dist" / "train.py"), "--config", config],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ) | {"PYTHONPATH": str(tmp_path / "fake")},
    )
    assert done.returncode == 2, done.stderr
    assert f"in use by process {process.pid} on" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_is_made_by_looking(tmp_path):
    require_unlocked(tmp_path / "run")
    require_unlocked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(logging.getLogger("rtl_dist"), "propagate", True)
    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path).acquire()
    assert "start no second job here" in caplog.text


def test_it_is_given_up_within_seconds(held, monkeypatch):
    run, _ = held
    looks = []
    monkeypatch.setattr(time, "sleep", looks.append)
    began_at = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began_at + sum(looks))
    with pytest.raises(UserError):
        require_unlocked(run)
    assert 1.0 < sum(looks) < 4.0


@pytest.mark.parametrize(
    ("env", "may"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "4"}, True),
        ({"RANK": "3", "WORLD_SIZE": "4"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "RANK": "1"}, False),
    ],
)
def test_who_may_leave_before_the_processes_have_met(env, may):
    assert may_end_alone(env) is may


def test_a_forked_worker_does_not_hold_the_lock_on(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    forked, child_forked = os.pipe()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # a worker that outlives this process's hold
        os.close(writing)
        os.write(child_forked, b".")
        os.read(reading, 1)
        os._exit(0)
    try:
        os.read(forked, 1)
        lock.release()
        again = RunLock(tmp_path)
        again.acquire()
        again.release()
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        for pipe in (forked, child_forked, reading):
            os.close(pipe)
