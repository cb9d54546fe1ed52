"""Locks that end with their process; and the one of a run folder, which names its owner."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import IO, Any

from rtl_dist.core.errors import UserError
from rtl_dist.core.regular_files import open_regular, regular_descriptor

LOG = logging.getLogger("rtl_dist")
LOCK_NAME = ".lock"
_OWNER = re.compile(r"process \d+ on ")
_MOST_BYTES = 1000
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
_PATIENCE_S = 2.0  # with an owner that is just ending, and with others that only look
_POLL_S = 0.1


def try_lock(file: IO[Any], *, patience_s: float = 0.0) -> bool:
    """Takes an open file's lock (flock) until it is closed; False if another process still has it
    after ``patience_s``.

    Raises:
        OSError: the disk has no locks.
    """
    tries_until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= tries_until:
                return False
            time.sleep(_POLL_S)


class RunLock:
    """An advisory lock (flock) of a run folder. A process that ends in any way has released it."""

    def __init__(self, run: Path) -> None:
        self._path = run / LOCK_NAME
        self._file: IO[bytes] | None = None
        self.owner = ""  # what the file says, once it was acquired

    def acquire(self) -> None:
        """Returns without the lock, and warns, on a disk that has none.

        Raises:
            UserError: another job has it. OSError: the folder cannot be written.
        """
        descriptor = regular_descriptor(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - held until release
        try:
            _take(file, self._path.parent)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                file.close()
                raise
            LOG.warning("%s is on a disk without locks: start no second job here", self._path)
        except UserError:
            file.close()
            raise
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.owner = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        content = self.owner.encode()
        file.write(content)  # over what was there: it says at all times that the folder is a run's
        file.truncate(len(content))
        os.fsync(file.fileno())  # else NFS keeps it from other nodes until the file is closed
        self._file = file
        # a loader worker must not hold the lock on when this process was killed
        os.register_at_fork(after_in_child=self.release)

    def remove(self) -> None:
        """Removes the file of a lock that this process has, of a folder that becomes none."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def owner_of(run: Path) -> str:
    """Who has or last had the lock of a run folder; empty where nobody ever had."""
    try:
        with open_regular(run / LOCK_NAME) as file:
            owner = file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    return owner if _OWNER.match(owner) else ""


def require_unlocked(run: Path) -> None:
    """Before anything else is done that takes time.

    Raises:
        UserError: another job has the run folder.
    """
    try:
        with open_regular(run / LOCK_NAME) as file:
            _take(file, run)
    except OSError:
        return  # there is none yet, or what is wrong is told by ``acquire``


def _take(file: IO[bytes], run: Path) -> None:
    if try_lock(file, patience_s=_PATIENCE_S):
        return
    file.seek(0)
    owner = file.read(_MOST_BYTES).decode("utf-8", "replace").strip() or "another job"
    raise UserError(
        f"the run folder {run} is in use by {owner}; wait for it, or choose another run.dir"
    )
