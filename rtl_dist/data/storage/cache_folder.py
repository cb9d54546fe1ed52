"""The files of a cache's folder, in which others may have put something else under the same names.

The names are public: links are not followed, pipes not waited for, and where everybody may add
files, those of others not read.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rtl_dist.core.errors import UserError
from rtl_dist.core.regular_files import NOT_REGULAR, open_regular, regular_descriptor
from rtl_dist.core.shared_folder import may_be_believed, refuse_if_anyone_may_replace

PART = ".part"
_LOCK = "room.lock"
_SHA256, _SIZE = re.compile("[0-9a-f]{64}"), re.compile("[0-9]{1,19}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cached file, or a part of one."""

    path: Path
    """Where it is."""
    bytes: int
    """Of the whole file."""
    used_at: int
    """When it was last used, in ns."""


class CacheFolder:
    """A folder ``path`` of files named ``<sha256>.<size>``, and ``room.lock``.

    Raises:
        UserError: everybody may replace what lies there. OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o775, parents=True, exist_ok=True)
        refuse_if_anyone_may_replace(path, key="data.cache_dir")
        os.close(self.open(path / _LOCK, os.O_RDONLY | os.O_CREAT))

    def open(self, path: Path, flags: int) -> int:
        """A descriptor of one of the cache's files.

        Raises:
            UserError: something else, or somebody else's, has its name. OSError: it is not there,
                or the disk fails.
        """
        try:
            descriptor = regular_descriptor(path, flags & ~os.O_CREAT)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            descriptor = regular_descriptor(path, flags)
        except OSError as error:
            if error.errno in NOT_REGULAR:
                raise self._planted(path, "is a link, a pipe or a folder") from error
            raise
        found = os.fstat(descriptor)
        if not may_be_believed(found, self.path):
            os.close(descriptor)
            raise self._planted(path, "is another user's")
        if flags & os.O_ACCMODE != os.O_RDONLY and found.st_nlink > 1:
            os.close(descriptor)
            raise self._planted(path, "is another file's second name")
        return descriptor

    @staticmethod
    def _planted(path: Path, what: str) -> UserError:
        return UserError(
            f"data.cache_dir: {path} {what}, where a file of the cache belongs; remove it, or set"
            " data.cache_dir to a folder of your own"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The lock under which names come and go."""
        with open(self.open(self.path / _LOCK, os.O_RDONLY | os.O_CREAT), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def entries(self) -> Iterator[Entry]:
        for entry in os.scandir(self.path):
            sha256, _, size = entry.name.removesuffix(PART).partition(".")
            # the rest of the folder is not ours
            if not _SHA256.fullmatch(sha256) or not _SIZE.fullmatch(size):
                continue
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and may_be_believed(found, self.path):
                    yield Entry(path=Path(entry.path), bytes=int(size), used_at=found.st_mtime_ns)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether it is a part that somebody is fetching."""
    if not path.name.endswith(PART):
        return False
    try:
        with open_regular(path) as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody has it; or nobody can tell
        return True
    return False


def delete(path: Path) -> bool:
    """Deletes a cached file, or a part that nobody is fetching; whether it did."""
    try:
        if path.name.endswith(PART):
            with open_regular(path) as part:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        else:
            path.unlink()
    except OSError:  # somebody has it; or it may not be deleted
        return False
    return True
