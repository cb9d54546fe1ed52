"""Runs of several real processes, for the tests of what they agree on."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "rtl_dist" / "train.py")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
TIMEOUT_S = 150


def environment(**more: str) -> dict[str, str]:
    """This process's, without any trace of a launcher or of the user's own accelerate settings."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    return clean | {"OMP_NUM_THREADS": "1", "HF_HOME": os.devnull} | more


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that a launcher's children can be ended with it
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and output; a process that hangs is ended with all its children."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {TIMEOUT_S} s:\n{output}")
    return process.returncode, output


def start_ranks(
    arguments: list[str], world_size: int, *, program: tuple[str, ...] = (SCRIPT,)
) -> list[subprocess.Popen[str]]:
    """One process a rank, told what torchrun would tell them, without a launcher between that
    would hide their exit codes.

    Args:
        program: what Python runs with the arguments: a script, or ``-c`` and some code.
    """
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            [sys.executable, *program, *arguments],
            environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
        )
        for rank in range(world_size)
    ]
