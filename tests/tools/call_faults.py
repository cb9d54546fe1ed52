"""A fault at each call of the C library that an action makes, one after the other, in forks."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from killed_runs import COUNT, FAIL, FAIL_ON, FULL, HALF, KILL, arm

from rtl_dist.core.errors import RtlDistError

KILLS = {"killed": KILL, "killed in mid-write": HALF}
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where flushing costs nothing
ERRORS = {
    "no space once": (FAIL, errno.ENOSPC),
    "full from then on": (FULL, errno.ENOSPC),
    "an error once": (FAIL, errno.EIO),
    "errors from then on": (FAIL_ON, errno.EIO),
    "read-only from then on": (FAIL_ON, errno.EROFS),
}


@dataclass(frozen=True)
class Outcome:
    """Of an action with a fault at one call. ending: ``done``, ``killed``, or what was raised."""

    call: int
    ending: str
    message: str = ""


def at_each_call(
    prepare: Callable[[Path], Callable[[], object]], action: int, error: int = 0
) -> Iterator[tuple[Path, Outcome]]:
    """Does the same with a fault at its first call, at its second, and so on until there is none
    left; each time in a folder that ``prepare`` filled, by what ``prepare`` returned, in a fork.
    """
    call = 0
    while True:
        call += 1
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
            folder = Path(name, "run")
            folder.mkdir()
            act = prepare(folder)
            told, mark = Path(name, "told"), Path(name, "mark")
            pid = os.fork()
            if not pid:
                _act(act, folder, call, action, error, told, mark)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code == -signal.SIGKILL:
                assert mark.stat().st_size, "killed by somebody else"
                yield folder, Outcome(call, "killed")
                continue
            assert code == 0, f"the child left with {code}"
            kind, _, message = told.read_text().partition("\n")
            yield folder, Outcome(call, kind, message)
            if not mark.stat().st_size:
                assert kind == "done", message
                return


def _act(
    act: Callable[[], object],
    folder: Path,
    call: int,
    action: int,
    error: int,
    told: Path,
    mark: Path,
) -> None:
    """In the fork, which never returns."""
    try:
        arm(f"{folder}/", call, action, error, mark=os.open(mark, os.O_CREAT | os.O_WRONLY))
        try:
            act()
        except RtlDistError as raised:
            text = f"RtlDistError\n{raised}"
        except Exception:  # noqa: BLE001 - told to the parent
            text = f"crash\n{traceback.format_exc()}"
        else:
            text = "done\n"
        arm("", 0, COUNT)
        told.write_text(text)
    finally:
        os._exit(0 if told.exists() else 1)


def calls_of(act: Callable[[], object], folder: Path) -> list[str]:
    """``<call> <path in folder>`` of all that an action changes."""
    trace = os.memfd_create("trace")
    arm(f"{folder}/", 0, COUNT, trace=trace)
    act()
    arm("", 0, COUNT)
    os.lseek(trace, 0, os.SEEK_SET)
    return os.read(trace, 1 << 20).decode().splitlines()
