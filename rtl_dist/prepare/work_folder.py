"""``OUT/.pack``: files on their way into a data set, and the lock of who writes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import replacing
from rtl_dist.core.lock import try_lock
from rtl_dist.core.regular_files import regular_descriptor

WORK_FOLDER = ".pack"
PLAN_FILE, LOCK_FILE = "plan.json", "lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds OUT for this process. Raises UserError: another pack is writing there."""
    work = out / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        if work.is_symlink():
            raise UserError(f"{work} is a link, and not followed: remove it, or choose another OUT")
        descriptor = regular_descriptor(work / LOCK_FILE, os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another OUT") from error
    with open(descriptor, "ab") as lock:
        try:
            is_free = try_lock(lock)
        except OSError:  # a file system without locks: nothing to be done
            is_free = True
        if not is_free:
            raise UserError(f"another pack is writing {out}: wait for it, or choose another OUT")
        try:
            yield
        finally:
            if not (work / PLAN_FILE).exists():  # OUT was refused: leave no trace in it
                with contextlib.suppress(OSError):
                    (work / LOCK_FILE).unlink()
                    work.rmdir()


@contextlib.contextmanager
def publishing(out: Path, final: Path) -> Iterator[BinaryIO]:
    """A file that appears at ``final`` whole and on disk, or not at all.

    It is written in the work folder, which is cleared of what a killed process left there.
    """
    with (
        replacing(final, within=out / WORK_FOLDER) as temporary,
        open(temporary, "wb") as file,
    ):
        yield file
