"""Ends a job of which one rank has stopped going on, instead of letting the others wait for ever.

A thread of every rank writes that rank's ``heartbeats/rank-00000.json`` again and again: a counter
of the thread (``ticks``: the process lives) and what the main thread does (``Heartbeat``). If the
main thread gets nowhere for a while, the threads of two chosen ranks, the watchers, read the files
of all ranks, find the one that holds the others up, say which it is, and end their process; the
launcher then ends the rest.

Clocks of other hosts are never compared: a watcher measures, on its own monotonic clock, how long
ago it saw a file change.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtl_dist.core.errors import RtlDistError, StopRequested
from rtl_dist.core.files import read_object
from rtl_dist.core.text import and_more
from rtl_dist.distributed.heartbeat import Heartbeat
from rtl_dist.distributed.stopping import IS_GUEST

LOG = logging.getLogger("rtl_dist")

HEARTBEATS = "heartbeats"
HEARTBEAT_FILE = re.compile(r"\.?rank-[0-9]+\.json")  # with a dot: half written
_ENDED = "ended"  # the phase of a rank that is done, in order or not: nobody waits for it
# Shares of the time-out. The files are read once this rank itself has been idle for the first; a
# rank whose ticks have stood still for the second counts as dead. Together they are below 1, so a
# dead rank is named before the time-out is over.
_READ_AFTER, _DEAD_AFTER = 0.4, 0.5
_INTERRUPTED_EVERY_S = 1.5  # the first interrupt may be taken for a request to save
_WRITES_A_SECOND = 64  # of all ranks together, on a disk they share


@dataclass(kw_only=True)
class _Seen:
    """What a watcher knows of a rank since it began to read the files."""

    content: dict[str, Any]
    """Of its file, as last read; empty: it could never be read."""
    ticked_at: float
    """When its ``ticks`` were last found changed (this process's monotonic clock, s)."""
    moved: bool = False
    """Whether its ``progress`` changed meanwhile."""


def clear_heartbeats(run: Path) -> None:
    """Removes the files of an earlier start, which may have had more ranks.

    Args:
        run: the run folder.
    """
    for path in (run / HEARTBEATS).glob("*rank-*.json"):
        if HEARTBEAT_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


class Watch:
    """Runs the thread for as long as the block lasts (use as a context manager)."""

    def __init__(
        self, run: Path, heartbeat: Heartbeat, *, rank: int, world_size: int, timeout_s: float
    ) -> None:
        """
        Args:
            run: the run folder, which all ranks must see.
            heartbeat: what this rank's main thread is doing.
            timeout_s: the job ends if nothing goes on for so long (``run.timeout``, s).
        """
        self._folder, self._heartbeat = run / HEARTBEATS, heartbeat
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._interval_s = min(timeout_s / 10, max(1.0, world_size / _WRITES_A_SECOND))
        # Two, in case one is the rank that stands still; not all, so that thousands of ranks do not
        # read thousands of files.
        self._watchers = sorted({0, world_size // 2})
        self._ticks = 0
        self._progress, self._moved_at = -1, time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._can_write = True
        self._end = threading.Event()
        self._is_guest = IS_GUEST.get()
        self._is_of_main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Watch:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end.set()
        self._thread.join()
        # After an error the last phase stays in the file, for the user to read.
        if kind is None or issubclass(kind, StopRequested):
            with self._heartbeat.phase(_ENDED):
                self._write()

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _run(self) -> None:
        """The thread: writes this rank's file every interval, and watches if that is its part."""
        woke_at = time.monotonic()
        while not self._end.wait(self._interval_s):
            self._ticks += 1
            self._write()
            now = time.monotonic()
            if now - woke_at > 3 * self._interval_s:
                # This process, or its disk, stood still; then the other ranks are not to blame for
                # what they seem not to have done meanwhile.
                self._start_over(now)
            woke_at = now
            if self._rank in self._watchers:
                stalled = self._stalled(now)
                if stalled and self._rank == self._speaker(stalled):
                    self._give_up(stalled)
                    return

    def _write(self) -> None:
        """Writes this rank's file, whole or not at all; a disk that refuses is told of once."""
        content = self._heartbeat.describe() | {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "ticks": self._ticks,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        path = self._path(self._rank)
        temporary = path.with_name(f".{path.name}")
        try:
            self._folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            temporary.replace(path)
            self._can_write = True
        except OSError as error:
            if self._can_write:
                LOG.warning("cannot write %s (%s); going on without", path, error.strerror)
            self._can_write = False

    def _start_over(self, now: float) -> None:
        """Counts idle time from now on, and forgets what was seen of the others."""
        self._moved_at = now
        self._seen.clear()

    def _stalled(self, now: float) -> dict[int, dict[str, Any]]:
        """The ranks that hold the job up, each with the content of its file; empty: none.

        A rank whose process does not tick is one. If all tick, but none got on for the whole
        time-out, it is those that do not wait for another; if all wait, all of them.
        """
        if self._heartbeat.progress != self._progress:
            self._progress = self._heartbeat.progress
            self._start_over(now)
        idle_s = now - self._moved_at
        if idle_s < _READ_AFTER * self._timeout_s:  # the usual case: no file is read
            return {}
        if not self._can_write:  # perhaps no rank can, so silence says nothing
            return {}
        for rank in range(self._world_size):
            self._look_at(rank, now)
        silent = {
            rank: seen.content
            for rank, seen in self._seen.items()
            if now - seen.ticked_at >= _DEAD_AFTER * self._timeout_s
            and seen.content.get("phase") != _ENDED
        }
        if silent:
            return silent
        if any(seen.moved or seen.content.get("open_ended") for seen in self._seen.values()):
            self._start_over(now)  # one works, and the others have to wait for it
        if idle_s < self._timeout_s:
            return {}
        everyone = {rank: seen.content for rank, seen in self._seen.items()}
        return {
            r: content for r, content in everyone.items() if not content.get("waiting")
        } or everyone

    def _look_at(self, rank: int, now: float) -> None:
        content = read_object(self._path(rank))
        seen = self._seen.setdefault(rank, _Seen(content=content, ticked_at=now))
        if content.get("ticks") != seen.content.get("ticks"):
            seen.ticked_at = now
        seen.moved |= content.get("progress") != seen.content.get("progress")
        seen.content = content or seen.content

    def _speaker(self, stalled: dict[int, dict[str, Any]]) -> int:
        """The one rank that tells the user and ends the job: the first watcher that is neither
        stalled nor ended; this one if there is none."""
        ended = {r for r, seen in self._seen.items() if seen.content.get("phase") == _ENDED}
        able = (rank for rank in self._watchers if rank not in stalled.keys() | ended)
        return next(able, self._rank)

    def _give_up(self, stalled: dict[int, dict[str, Any]]) -> None:
        """Tells the user and ends this process from outside its main thread, which may be inside a
        call that never returns. In a guest it interrupts that thread, if it is the job's."""
        sys.stderr.write(f"rtl-dist: {_sentence(stalled, self._timeout_s, self._folder)}\n")
        sys.stderr.flush()
        with self._heartbeat.phase(_ENDED):
            self._write()
        if self._is_guest:
            while self._is_of_main and not self._end.wait(_INTERRUPTED_EVERY_S):
                # a signal that is sent, unlike interrupt_main's, also ends a call that waits
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return
        for worker in multiprocessing.active_children():  # it may be a loader's that stands still
            worker.kill()
        os._exit(RtlDistError.exit_code)


def _sentence(stalled: dict[int, dict[str, Any]], timeout_s: float, folder: Path) -> str:
    """The line for the user, about the rank that got least far."""
    rank = min(stalled, key=lambda rank: (stalled[rank].get("progress", -1), rank))
    content = stalled[rank]
    who = f"rank {rank}"
    if not content:
        return f"{who} has left no sign of life in {folder}; is run.dir on a disk all hosts see?"
    who += f" (process {content['pid']} on {content['host']}){and_more(len(stalled) - 1)}"
    where = f"phase {content['phase']}"
    for key in ("stage", "step", "sample"):
        if content[key] is not None:
            where += f", {'last sample' if key == 'sample' else key} {content[key]}"
    return (
        f"{who} made no progress for {timeout_s:g} s (run.timeout), and the others waited for it;"
        f" its last: {where}; see {folder}, and start the same command again: it goes on from the"
        " newest checkpoint"
    )
