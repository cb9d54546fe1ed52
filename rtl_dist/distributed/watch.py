"""The end of a job of which one process does not go on: heartbeats are written and looked at."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rtl_dist.core.errors import StopRequested
from rtl_dist.core.files import read_object
from rtl_dist.core.text import and_more
from rtl_dist.distributed.heartbeat import FOLDER, Heartbeat

LOG = logging.getLogger("rtl_dist")


_FAILED = 1
_ENDED = "ended"
_SUSPECT, _SILENT = 0.4, 0.5  # of the time-out: together below it
_WRITES_A_SECOND = 64  # of all ranks together, on a disk they share


@dataclass
class _Seen:
    """What was last found of a rank, when it was last seen to tick (monotonic, s), and whether it
    got on since it was first looked at."""

    content: dict[str, Any]
    ticked_at: float
    moved: bool = False


def clear_heartbeats(run: Path) -> None:
    """Removes what an earlier start, perhaps of more ranks, left behind."""
    for path in (run / FOLDER).glob("*.json"):
        path.unlink(missing_ok=True)


class Watch:
    """A thread that writes this rank's heartbeat and, on some ranks, looks at the others'."""

    def __init__(
        self, run: Path, heartbeat: Heartbeat, *, rank: int, world_size: int, timeout_s: float
    ) -> None:
        self._folder, self._heartbeat = run / FOLDER, heartbeat
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._interval_s = min(timeout_s / 10, max(1.0, world_size / _WRITES_A_SECOND))
        # a few, so that thousands of ranks do not read thousands of files
        self._watchers = sorted({0, world_size // 2})
        self._ticks = 0
        self._progress, self._moved_at = -1, time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._can_write = True
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Watch:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if kind is None or issubclass(kind, StopRequested):
            with self._heartbeat.phase(_ENDED):
                self._write()

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _run(self) -> None:
        looked_at = time.monotonic()
        while not self._end.wait(self._interval_s):
            self._ticks += 1
            self._write()
            now = time.monotonic()
            if now - looked_at > 3 * self._interval_s:  # this process, or its disk, stood still
                self._start_over(now)
            looked_at = now
            if self._rank in self._watchers:
                stalled = self._stalled(now)
                if stalled and self._rank == self._speaker(stalled):
                    self._give_up(stalled)

    def _write(self) -> None:
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
        self._moved_at = now
        self._seen.clear()

    def _stalled(self, now: float) -> dict[int, dict[str, Any]]:
        """The heartbeats of the ranks that hold the job up: those that do not tick, or, if all of
        them do and none gets on, those that wait for no other."""
        if self._heartbeat.progress != self._progress:
            self._progress = self._heartbeat.progress
            self._start_over(now)
        idle_s = now - self._moved_at
        if idle_s < _SUSPECT * self._timeout_s:  # nothing to read in the normal course of things
            return {}
        if not self._can_write:  # nor can the others, perhaps
            return {}
        for rank in range(self._world_size):
            self._look_at(rank, now)
        silent = {
            rank: seen.content
            for rank, seen in self._seen.items()
            if now - seen.ticked_at >= _SILENT * self._timeout_s
            and seen.content.get("phase") != _ENDED
        }
        if silent:
            return silent
        if any(seen.moved or seen.content.get("open_ended") for seen in self._seen.values()):
            self._start_over(now)  # one works, and the others have to wait
        if idle_s < self._timeout_s:
            return {}
        everyone = {rank: seen.content for rank, seen in self._seen.items()}
        return {
            r: content for r, content in everyone.items() if not content.get("waiting")
        } or everyone

    def _speaker(self, stalled: dict[int, dict[str, Any]]) -> int:
        """The first watcher that can: the others end with it."""
        ended = {r for r, seen in self._seen.items() if seen.content.get("phase") == _ENDED}
        able = (rank for rank in self._watchers if rank not in stalled.keys() | ended)
        return next(able, self._rank)

    def _look_at(self, rank: int, now: float) -> None:
        content = read_object(self._path(rank))
        seen = self._seen.setdefault(rank, _Seen(content, now))
        if content.get("ticks") != seen.content.get("ticks"):
            seen.ticked_at = now
        seen.moved |= content.get("progress") != seen.content.get("progress")
        seen.content = content or seen.content

    def _give_up(self, stalled: dict[int, dict[str, Any]]) -> NoReturn:
        sys.stderr.write(f"rtl-dist: {_sentence(stalled, self._timeout_s, self._folder)}\n")
        sys.stderr.flush()
        with self._heartbeat.phase(_ENDED):
            self._write()
        for worker in multiprocessing.active_children():  # which may be what does not go on
            worker.kill()
        os._exit(_FAILED)


def _sentence(stalled: dict[int, dict[str, Any]], timeout_s: float, folder: Path) -> str:
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
