"""The process that copies metrics to W&B: rows whole and once, and it ends when it must."""

import json
import os
import subprocess
import sys
import time

from wandb_packages import make_package

from rtl_dist.records import wandb_copy


def test_rows_are_taken_whole_and_a_file_that_was_cut_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "what": "more"}\n{"st')
    with open(path, "rb") as file:
        assert [row["step"] for row in wandb_copy._whole_rows(file)] == [1, 2]
        with open(path, "ab") as more:
            more.write(b'ep": 3}\n')
        assert [row["step"] for row in wandb_copy._whole_rows(file)] == [3]
        os.truncate(path, 12)
        assert list(wandb_copy._whole_rows(file)) == []
        with open(path, "ab") as more:
            for step in (2, 3, 4, 5):
                more.write(f'{{"step": {step}, "w": 12}}\n'.encode())
        read = [row["step"] for _ in range(3) for row in wandb_copy._whole_rows(file)]
        assert read[-5:] == [1, 2, 3, 4, 5]


def test_the_copy_ends_with_training_although_a_worker_of_it_holds_the_pipe_open(tmp_path):
    training = subprocess.Popen(["sleep", "1000"])
    package = make_package(tmp_path, "import time\ntime.sleep(1000)")
    settings = {"folder": str(tmp_path), "mode": "offline"}
    settings |= {"parent": training.pid, "finish_s": 0.5}
    training.kill()
    training.wait()
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-P", wandb_copy.__file__, json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": str(package)},
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as copy:
        assert copy.wait(timeout=30) == 1
    assert time.monotonic() - began > 0.5


RECORDING = """
import atexit, os, time, types
Settings = dict
log = open(os.environ["LOGGED"], "a", buffering=1)
atexit.register(lambda: (time.sleep(0.5), log.write("gone\\n")))  # with files that are whole
def init(**options):
    log.write("begins\\n")
    time.sleep(1.0)
    run = types.SimpleNamespace(summary={}, starting_step=0)
    run.log = lambda row, step, commit: log.write(f"{step}\\n")
    run.finish = lambda exit_code: log.write("ends\\n")
    return run
"""


def test_the_copy_waits_for_that_of_the_run_that_was_killed(tmp_path):
    package = make_package(tmp_path, RECORDING)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    settings = {"folder": str(tmp_path), "id": "a", "project": "p", "mode": "offline"}
    settings |= {"parent": os.getpid(), "finish_s": 60, "connect_s": 60}
    logged = tmp_path / "logged"
    env = {**os.environ, "PYTHONPATH": str(package), "LOGGED": str(logged)}
    copies = [
        subprocess.Popen(
            [sys.executable, "-P", wandb_copy.__file__, json.dumps(settings)],
            env=env,
            stdin=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [copy.wait(timeout=60) for copy in copies] == [0, 0]
    assert logged.read_text().split() == ["begins", "1", "2", "ends", "gone"] * 2
