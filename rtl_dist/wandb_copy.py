"""Copies a run's ``metrics.jsonl`` to W&B as it grows: a process beside training, which neither a
dead network nor a W&B that hangs can hold up.

    python rtl_dist/wandb_copy.py '{"folder": "runs/first", "id": ..., "mode": ..., "project": ...}'

It ends when its standard input or the process that started it does, after the rows that are left. A
row is copied once, however often the run was killed: ``wandb/copied.json`` has the last one's step.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb

_POLL_S = 0.5
_INIT_TIMEOUT_S = 60
_LAST_S = 60.0  # for what is left when training has ended
_FAILED = 1


def main() -> int:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # they are the training process's
    settings = json.loads(sys.argv[1])
    training_ended = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(training_ended,), daemon=True).start()
    folder = Path(settings["folder"])
    with _turn(folder):
        run = _start(settings)
        _copy_rows(folder, run, training_ended)
        results = _results(folder)
        run.summary.update({k: v for k, v in results.items() if k != "bad_samples"})
        run.finish(exit_code=0 if results.get("status") == "done" else _FAILED)
    return 0


def _start(settings: dict[str, Any]) -> Any:
    """The W&B run: a new one, or the one with this id. Offline where it cannot be reached."""
    config = json.loads(Path(settings["folder"], "wandb", "config.json").read_text("utf-8"))

    def init(mode: str) -> Any:
        return wandb.init(
            project=settings["project"],
            name=Path(settings["folder"]).name,
            dir=settings["folder"],
            id=settings["id"],
            resume="allow",
            mode=mode,
            config=config,
            settings=wandb.Settings(
                init_timeout=_INIT_TIMEOUT_S, console="off", silent=True, x_disable_stats=True
            ),
        )

    try:
        return init(settings["mode"])
    except Exception as error:  # noqa: BLE001 - whatever it is, what is written can be sent later
        sys.stderr.write(f"{error}; going on offline, for `wandb sync` later\n")
        sys.stderr.flush()
        return init("offline")


def _copy_rows(folder: Path, run: Any, training_ended: threading.Event) -> None:
    copied_file = folder / "wandb" / "copied.json"
    copied = -1
    if run.settings.mode == "offline":
        with contextlib.suppress(OSError, ValueError):
            copied = json.loads(copied_file.read_text("utf-8"))["step"]
    elif run.resumed:
        copied = run.step - 1  # what the server has is the truth
    with open(folder / "metrics.jsonl", "rb") as file:
        while True:
            is_last = training_ended.wait(_POLL_S)
            before = copied
            for row in _whole_rows(file):
                if row["step"] > copied:
                    run.log(row, step=row["step"])
                    copied = row["step"]
            if copied != before:
                copied_file.write_text(json.dumps({"step": copied}), encoding="utf-8")
            if is_last:
                return


def _whole_rows(file: Any) -> Iterator[dict[str, Any]]:
    """The rows from where the file stands; what has not come whole is left for the next time."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(start)
            return
        yield json.loads(line)


def _results(folder: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return results


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Waits for the copy of a run that was just killed to end."""
    with open(folder / "wandb" / ".lock", "a") as file:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for_the_end(training_ended: threading.Event) -> None:
    """Sets the event when training has ended, and ends this process if it then takes too long."""
    parent = os.getppid()
    waiting = threading.Event()

    def read() -> None:
        sys.stdin.buffer.read(1)  # returns when it is closed, too
        waiting.set()

    threading.Thread(target=read, daemon=True).start()
    while not waiting.wait(1.0) and os.getppid() == parent:  # a forked worker may hold it open
        pass
    training_ended.set()
    if not threading.Event().wait(_LAST_S):
        _kill_children()
        os._exit(_FAILED)


def _kill_children() -> None:
    """W&B's own process, which may be the one that hangs."""
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in listing.read_text().split():
                os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
