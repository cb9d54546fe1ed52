"""Copies a run's ``metrics.jsonl`` to W&B as it grows: a process beside training, which neither a
dead network nor a W&B that hangs can hold up.

    python rtl_dist/records/wandb_copy.py '{"folder": "runs/first", "id": ..., "mode": ...,
        "project": ..., "parent": PID, "connect_s": 40, "finish_s": 60}'

It ends when its standard input or the process that started it does, after the rows that are left,
or ``finish_s`` later. Where W&B does not answer within ``connect_s``, or fails, it begins again
offline, once. A row is copied once, however often the run was killed: what earlier starts left is
read from W&B itself, online from the server, offline from the files they wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

_FOR_TRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_S = 0.5
_FAILED = 1
_BLOCK = 32768  # of W&B's files
_PART = struct.Struct("<IHB")  # a checksum, a size, and one of:
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_TRAINING)
    os.nice(5)  # training comes first
    settings = json.loads(sys.argv[1])
    _prepare_environment(settings["mode"])
    training_ended = threading.Event()
    watch = threading.Thread(target=_watch_training, args=(settings, training_ended), daemon=True)
    watch.start()
    import wandb  # noqa: F401 - under watch: it may hang, too

    _wait_for_turn(Path(settings["folder"]))
    try:
        _copy(settings, training_ended)
    except Exception as error:  # noqa: BLE001 - whatever it is, offline may do
        traceback.print_exc()
        _begin_again_offline(settings, error)
    if problem := settings.get("problem"):
        _tell(f"{problem}; what W&B does not have is offline, for `wandb sync`")
    return _FAILED if problem else 0


def _prepare_environment(mode: str) -> None:
    """What W&B takes from there before it is told anything."""
    os.environ["WANDB_MODE"] = mode  # offline, it then sends nothing of its own, either
    os.environ["WANDB_SILENT"] = "true"  # what is said is for the user to read; and no prompts
    os.environ.pop("WANDB_SERVICE", None)  # another process's, which we could not end
    if mode == "offline":
        os.environ.pop("WANDB_API_KEY", None)  # which could be refused


def _copy(settings: dict[str, Any], training_ended: threading.Event) -> None:
    folder = Path(settings["folder"])
    recorded = _last_recorded_step(folder, settings["id"])
    run = _start(settings)
    if settings["mode"] == "online":
        recorded = run.starting_step - 1
    _copy_rows(folder / "metrics.jsonl", run, training_ended, after=recorded)
    results = _results(folder)
    run.summary.update({k: v for k, v in results.items() if k != "bad_samples"})
    run.finish(exit_code=0 if results.get("status") == "done" else _FAILED)
    if settings["mode"] == "online":  # so `wandb sync` need not send what was once left offline
        for path in _files(folder, settings["id"]):
            path.with_suffix(".wandb.synced").touch()


def _start(settings: dict[str, Any]) -> Any:
    """The W&B run: a new one, or the one with this id."""
    import wandb

    folder = Path(settings["folder"])
    return wandb.init(
        project=settings["project"],
        name=folder.name,
        dir=settings["folder"],
        id=settings["id"],
        resume="allow",
        mode=settings["mode"],
        config=json.loads((folder / "wandb" / "config.json").read_text("utf-8")),
        settings=wandb.Settings(
            init_timeout=settings["connect_s"], console="off", silent=True, x_disable_stats=True
        ),
    )


def _copy_rows(path: Path, run: Any, training_ended: threading.Event, *, after: int) -> None:
    with open(path, "rb") as file:
        while True:
            is_last = training_ended.wait(_POLL_S)
            for row in _whole_rows(file):
                if row["step"] > after:
                    after = row["step"]
                    run.log(row, step=after, commit=True)
            if is_last:
                return


def _whole_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The rows from where the file stands; what has not come whole is left for the next time."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(start)
            return
        try:
            row = json.loads(line)
        except ValueError:  # a resumed run has cut the file meanwhile, and we stand within a row
            file.seek(0)
            return
        yield row


def _last_recorded_step(folder: Path, run_id: str) -> int:
    """Of all that earlier starts wrote into their files; -1 if they wrote nothing."""
    from wandb.proto.wandb_internal_pb2 import Record

    last = -1
    for path in _files(folder, run_id):
        with open(path, "rb") as file:
            for content in _records(file):
                record = Record.FromString(content)
                if record.HasField("history"):
                    last = max(last, record.history.step.num)
    return last


def _files(folder: Path, run_id: str) -> Iterator[Path]:
    return folder.glob(f"wandb/*run-*/run-{run_id}.wandb")


def _records(file: BinaryIO) -> Iterator[bytes]:
    """The whole records of a W&B file: LevelDB's log, blocks that hold parts of records, up to the
    first that was not written to its end."""
    content, at = b"", len(":W&B") + 3  # magic number and version
    while block := file.read(_BLOCK):
        while at + _PART.size <= len(block):
            checksum, size, kind = _PART.unpack_from(block, at)
            end = at + _PART.size + size
            if zlib.crc32(block[at + _PART.size - 1 : end]) != checksum:
                return
            part = block[at + _PART.size : end]
            content = part if kind in (_WHOLE, _FIRST) else content + part
            if kind in (_WHOLE, _LAST):
                yield content
            at = end
        at = 0


def _results(folder: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return results


def _wait_for_turn(folder: Path) -> None:
    """Until the copy of a run that was just killed has ended: W&B's files are whole only then."""
    lock = os.open(folder / "wandb" / ".lock", os.O_CREAT | os.O_RDWR)  # held as long as we live
    with contextlib.suppress(OSError):  # a disk without locks
        fcntl.flock(lock, fcntl.LOCK_EX)


def _begin_again_offline(settings: dict[str, Any], error: Exception) -> NoReturn:
    """In a new program: W&B's own process may still hold the run, or be gone."""
    _kill_children()
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    if "problem" in settings:
        _tell(f"{settings['problem']}; then {problem}")
        os._exit(_FAILED)
    settings = settings | {"mode": "offline", "problem": problem}
    os.execv(sys.executable, [sys.executable, "-P", __file__, json.dumps(settings)])


def _watch_training(settings: dict[str, Any], training_ended: threading.Event) -> None:
    """Sets the event when training has ended, and ends this process if it then takes too long."""
    waiting = threading.Event()

    def read() -> None:
        os.read(0, 1)  # returns when it is closed, too
        waiting.set()

    threading.Thread(target=read, daemon=True).start()
    while not waiting.wait(1.0) and os.getppid() == settings["parent"]:
        pass  # training's pipe may be held open by a forked worker of it
    training_ended.set()
    if not threading.Event().wait(settings["finish_s"]):
        _kill_children()
        _tell("gave up, as W&B hangs")
        os._exit(_FAILED)


def _kill_children() -> None:
    """W&B's own process, which may be the one that hangs."""
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in listing.read_text().split():
                os.kill(int(pid), signal.SIGKILL)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
