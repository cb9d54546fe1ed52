"""Publishing a data set: files whole or not there, dataset.json last."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import flush_to_disk

WORK_FOLDER = ".pack"
LEFT_OUT_FILE = "left_out.csv"
_PLAN, _LOCK = "plan.json", "lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds OUT for this process. Raises UserError: another pack is writing there."""
    work = out / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / _LOCK, "ab")  # noqa: SIM115 (held, not read)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another OUT") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another pack is writing {out}: wait for it, or choose another OUT"
            ) from None
        except OSError:  # a file system without locks: nothing to be done
            pass
        try:
            yield
        finally:
            if not (work / _PLAN).exists():  # OUT was refused: leave no trace in it
                with contextlib.suppress(OSError):
                    (work / _LOCK).unlink()
                    work.rmdir()


@contextlib.contextmanager
def publishing(out: Path, final: Path) -> Iterator[BinaryIO]:
    """A file that appears at ``final`` whole and on disk, or not at all.

    It is written in the work folder, under a name of this process.
    """
    temporary = out / WORK_FOLDER / f"{final.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, final)
    flush_to_disk(final.parent)


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()
