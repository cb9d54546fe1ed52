"""One start of a training in a session of its own, to be killed whole or one rank of it.

A launcher gives each rank a session of its own, too; so the processes are looked for as a family.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import psutil

from rtl_dist.core.errors import RtlDistError

_POLL_S = 0.005
_CLOCK_TICK_S = 0.01  # of a disk's times, which may lie so far behind
_DYING_S = 120.0  # a process that holds a GPU takes its time
_INTERRUPTS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextlib.contextmanager
def started(
    command: list[str], *, run: Path, log: Path, tick: Callable[[], object]
) -> Iterator[Attempt]:
    """Starts a command that trains into ``run``; none of its processes outlives the block.

    Args:
        log: gets what the command writes, after what is there.
        tick: called every few milliseconds of waiting.

    Raises:
        KeyboardInterrupt: this process was asked to stop, also by SIGTERM or SIGHUP.
    """
    before = _stamp(run)
    with _Interrupts() as interrupts:
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        attempt = Attempt(process, run, log, before, interrupts, tick)
        try:
            yield attempt
        finally:
            attempt.kill()
        interrupts.act()


class Attempt:
    """A training that was started, until it ends or is killed; made by ``started``."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        run: Path,
        log: Path,
        before: tuple[int, int] | None,
        interrupts: _Interrupts,
        tick: Callable[[], object],
    ) -> None:
        self.log = log
        self._started_at = time.time()
        self._opened_at = time.monotonic()
        self._work_began_at: float | None = None
        self._process, self._run, self._before = process, run, before
        self._interrupts, self._tick = interrupts, tick
        self._family: list[psutil.Process] = []

    @property
    def age_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._opened_at

    @property
    def work_s(self) -> float | None:
        """Since this start wrote the run's config, with which start-up ends; None before that."""
        if self._work_began_at is None and _stamp(self._run) != self._before:
            self._work_began_at = time.monotonic()
        return None if self._work_began_at is None else time.monotonic() - self._work_began_at

    def has_written(self, path: Path) -> bool:
        """Whether a file is of this start, as far as clocks can tell."""
        return path.exists() and path.stat().st_mtime >= self._started_at - _CLOCK_TICK_S

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until a condition holds (True) or the training ends (False).

        Raises:
            KeyboardInterrupt: see ``started``.
        """
        while self._process.poll() is None:
            if until():
                return True
            self._interrupts.act()
            self._tick()
            time.sleep(_POLL_S)
        return False

    def require_success(self, what: str) -> None:
        """Waits for the end.

        Raises:
            RtlDistError: with the exit code and last line of a training that failed.
        """
        self.wait()
        code = self._process.returncode
        if code == 0:
            return
        ending = f"code {code}" if code > 0 else signal.Signals(-code).name
        error = RtlDistError(f"{what} ended with {ending}: {_last_words(self.log)} ({self.log})")
        error.exit_code = code if code > 0 else 1
        raise error

    def kill(self) -> bool:
        """SIGKILL for every process; returns once they are gone: whether they were still there."""
        self._stop_and_look()
        for member in self._family:
            _end(member)
        was_killed = self._process.wait() == -signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):  # loader workers of one that ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _DYING_S
        while any(map(_lives, self._family)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return was_killed

    def kill_rank(self, random: Random) -> bool:
        """SIGKILL for one rank; returns once the launcher has ended: whether because of that.

        Raises:
            RtlDistError: it did not end the other ranks.
        """
        ranks = self._stop_and_look()
        for victim in random.sample(ranks, k=min(1, len(ranks))):
            _end(victim)
        self._process.send_signal(signal.SIGCONT)
        limit_s = self.age_s + _DYING_S
        if self.wait(lambda: self.age_s > limit_s):
            raise RtlDistError(
                f"a rank was killed and {_DYING_S:.0f} s later others still ran ({self.log})"
            )
        failed = self._process.returncode != 0
        self.kill()  # what the launcher left behind
        return failed

    def _stop_and_look(self) -> list[psutil.Process]:
        """Stops the process, so that it starts no others, and notes all below it; returns its
        children."""
        if self._process.poll() is not None:
            return []
        parent = psutil.Process(self._process.pid)  # waited for by us alone, so it cannot vanish
        parent.suspend()
        self._family = [parent, *parent.children(recursive=True)]
        return parent.children()


class _Interrupts:
    """Within the block a request to stop is only noted, to be acted on: it must not come between
    the start of a process and the moment from which on that process is sure to be ended."""

    def __init__(self) -> None:
        self._noted = False
        self._old: dict[int, Any] = {}

    def act(self) -> None:
        if self._noted:
            raise KeyboardInterrupt

    def __enter__(self) -> _Interrupts:
        for name in _INTERRUPTS:
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True


def _stamp(run: Path) -> tuple[int, int] | None:
    """Differs after each writing of the run's config, which replaces the file."""
    try:
        found = (run / "config.yaml").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _end(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if process.is_running() and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _last_words(log: Path) -> str:
    """What a training said last; under a launcher, which adds its own, the line that is ours."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").split("\n")]
    ours = [line.removeprefix("rtl-dist: ") for line in lines if line.startswith("rtl-dist: ")]
    return (ours or [line for line in lines if line] or ["it said nothing"])[-1]
