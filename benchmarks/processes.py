"""A process of this Python, run to its end and measured, its children's time included."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
LOOK_EVERY_S = 0.5


class ProcessFailed(SystemExit):
    """A process ended with another status than 0; the message holds what it wrote to stderr."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """What a process left behind.

    cpu_s: of itself and its children.
    began_at: ``time.time()`` when it was started.
    curve: (wall seconds since it began, CPU seconds until then), about two a second.
    """

    wall_s: float
    cpu_s: float
    began_at: float
    out: str
    err: str
    curve: tuple[tuple[float, float], ...]

    def cpu_s_at(self, wall_s: float) -> float:
        """CPU seconds spent until then, on a straight line between two looks."""
        before = (0.0, 0.0)
        for after in (*self.curve, (self.wall_s, self.cpu_s)):
            if after[0] >= wall_s:
                share = (wall_s - before[0]) / max(after[0] - before[0], 1e-9)
                return before[1] + share * (after[1] - before[1])
            before = after
        return self.cpu_s


def run_python(*command: str, look: bool = False, cwd: Path | None = None) -> Finished:
    """Runs this Python. ``look``: whether to draw the curve meanwhile.

    Raises:
        ProcessFailed: it did.
    """
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile all it imports
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])
    cpu_before, started_at, began_at = cpu_of_children_s(), time.perf_counter(), time.time()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=err, env=environment, cwd=cwd
        )
        curve = _watch(process, started_at) if look else ()
        status = process.wait()
        wall_s = time.perf_counter() - started_at
        out.seek(0)
        err.seek(0)
        told, complaints = out.read(), err.read()
    if status:
        raise ProcessFailed(f"{' '.join(command)} failed:\n{complaints}")
    return Finished(
        wall_s=wall_s,
        cpu_s=cpu_of_children_s() - cpu_before,
        began_at=began_at,
        out=told,
        err=complaints,
        curve=curve,
    )


def cpu_of_children_s() -> float:
    """Of all processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _watch(process: subprocess.Popen[bytes], started_at: float) -> tuple[tuple[float, float], ...]:
    """The curve, until the process ends."""
    curve: list[tuple[float, float]] = []
    while True:
        try:
            process.wait(LOOK_EVERY_S)
            return tuple(curve)
        except subprocess.TimeoutExpired:
            highest = curve[-1][1] if curve else 0.0  # a grandchild's may be lost as it ends
            spent_s = max(highest, _cpu_of_tree_s(process.pid))
            curve.append((time.perf_counter() - started_at, spent_s))


def _cpu_of_tree_s(pid: int) -> float:
    total = 0.0
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    except psutil.Error:  # one of them has just ended: the next look is right again
        pass
    return total
