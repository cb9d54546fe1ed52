"""What a job says of itself: lines with their time, and now and then how far it has come."""

import contextlib
import logging
import os
import pty
import re
import signal
import sys
import termios
import threading

import pytest
import torch
from tqdm import tqdm

from rtl_dist.distributed.hardware import described, shortfall
from rtl_dist.distributed.terminal import FIRST_S, ProgressLines, configure_logging, progress

LOG = logging.getLogger("rtl_dist")


@contextlib.contextmanager
def terminal(monkeypatch):
    """stderr is a terminal of 80 columns; yields a function: what was written to it since, up to
    some words."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 80))
    with open(there, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        configure_logging(is_main=True)

        def written(words):
            stream.flush()
            found = b""
            while words.encode() not in found:
                found += os.read(here, 2**16)
            return found.decode(errors="ignore").replace("\r\n", "\n")

        yield written
    os.close(here)
    LOG.handlers.clear()


def test_a_line_is_written_above_the_bar_and_wrapped(monkeypatch):
    with (
        terminal(monkeypatch) as written,
        progress(total=9, what="finetune", unit="step") as bar,
    ):
        bar.update()
        written("finetune")
        LOG.info("epoch 1.00  step 23  %s", "  ".join(f"val/top{n} 0.8312" for n in range(9)))
        lines = written("finetune").split("\n")  # the bar is there again
    assert re.match(r"\r +\r\d\d:\d\d:\d\d epoch 1\.00", lines[0])  # the bar was taken off
    assert all(len(line.rpartition("\r")[2]) <= 80 for line in lines)
    assert lines[1].startswith(" " * 9 + "val/")


def test_off_a_terminal_a_line_is_a_line_with_its_time(capsys):
    configure_logging(is_main=True)
    LOG.info("x" * 200)
    assert re.fullmatch(r"\d\d:\d\d:\d\d x{200}\n", capsys.readouterr().err)


def test_a_worker_killed_while_it_writes_a_line_stops_no_other_process(capsys):
    configure_logging(is_main=True)
    worker = os.fork()
    if not worker:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(worker, 0)
    line = threading.Thread(target=LOG.info, args=("a line",), daemon=True)
    line.start()
    line.join(10)
    assert not line.is_alive()
    assert "a line" in capsys.readouterr().err


def test_off_a_terminal_progress_is_told_now_and_then(capsys):
    configure_logging(is_main=True)
    now = [0.0]
    work = ProgressLines(
        total=4000, what="head", unit="step", done=1000, images=32, clock=lambda: now[0]
    )
    with work as lines:
        for _ in range(3000):
            now[0] += 1
            lines.update()
    told = capsys.readouterr().err.splitlines()
    first = "head: step 1,010 of 4,000 (25 %), 32 images/s, about 49 min 50 s left"
    assert told[0].endswith(first)
    assert 5 < len(told) < 20  # ever more seldom
    work = ProgressLines(total=9, what="x", unit="batch", clock=lambda: now[0])
    work.update()
    now[0] += FIRST_S
    work.update(8)
    assert capsys.readouterr().err == ""  # it is done


@pytest.fixture
def no_gpu(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "CUDA", "OMP")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("too old")))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return monkeypatch


CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "value", "asked"), [
    ("CUDA_VISIBLE_DEVICES", "0", True), ("CUDA_VISIBLE_DEVICES", "", False),
    ("CUDA_VISIBLE_DEVICES", "-1,-1", False), ("SLURM_JOB_GPUS", "0", True),
    ("SLURM_GPUS_ON_NODE", "2", True), ("SLURM_GPUS_ON_NODE", "0", False),
    ("SLURM_GPUS_PER_NODE", "a100:4", True),
])  # fmt: skip
def test_a_gpu_that_was_asked_for_and_is_not_there_is_told(no_gpu, name, value, asked):
    no_gpu.setenv(name, value)
    told = [line for line in shortfall(CPU, local_world_size=1, cpus=1) if "GPU" in line]
    expected = f"a GPU was asked for ({name}={value}) and none can be used: too old; update it, or"
    assert len(told) == asked
    assert all(line.startswith(expected) for line in told)


def test_a_torch_without_cuda_is_told(no_gpu):
    no_gpu.setenv("CUDA_VISIBLE_DEVICES", "0")
    no_gpu.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in shortfall(CPU, local_world_size=1, cpus=1)[0]


def test_threads_that_are_not_used_are_told(no_gpu):
    from rtl_dist.distributed import hardware

    no_gpu.setattr(hardware, "available_cpus", lambda: 8)
    no_gpu.setattr(torch, "get_num_threads", lambda: 1)
    assert "1 thread(s) each of 8 CPU(s), precision bf16 (bfloat16 beside float32)" in described(
        CPU, "bf16", local_world_size=2
    )
    no_gpu.setenv("OMP_NUM_THREADS", "1")
    (told,) = [line for line in shortfall(CPU, local_world_size=2, cpus=4) if "CPUs" in line]
    assert told.startswith("each process computes with 1 thread(s) and could use 4 CPUs (OMP_NUM_")
    no_gpu.setattr(torch, "get_num_threads", lambda: 4)
    assert not [line for line in shortfall(CPU, local_world_size=2, cpus=4) if "CPUs" in line]
