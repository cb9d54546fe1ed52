"""A bounded folder of remote files, shared by all processes of a machine.

A file is known by the sha256 of its content, so data sets share what they have in common. It is
whole or not there: bytes go to ``<sha256>.<size>.part``, whose holder has it locked, and get the
name ``<sha256>.<size>`` once they are all there, on disk and have that checksum. Who comes second
waits for the first, and fails if that one fails (``.failed``): a place that is gone is tried once
for all. A part left behind by a killed process is taken up where it ends.

Names come and go under one lock, ``room.lock``. A part counts as the whole file, and before it is
made, the files that were used least recently are deleted until all of it fits; so the folder never
exceeds its limit. A file may be deleted while another process reads it, which on POSIX does no
harm: it is fetched again at its next use.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rtl_dist.core.errors import DataError, RemoteError, RtlDistError, ShardError, UserError
from rtl_dist.core.files import flush_to_disk, user_cache_folder
from rtl_dist.core.regular_files import open_regular
from rtl_dist.core.urls import Redirects
from rtl_dist.data.storage.cache_folder import PART, CacheFolder, delete, is_at, is_locked
from rtl_dist.data.storage.remote import read_chunks

_FAILED = ".failed"
LOG = logging.getLogger("rtl_dist")
_SHARE_OF_FREE_SPACE = 0.8
_GIGABYTE = 10**9
_POLL_S = 0.05
_SHA256 = re.compile("[0-9a-f]{64}")
_TRIES = 3  # to read what was fetched
_LONGEST_FAILURE = 10_000


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """What is behind a URL.

    Raises:
        DataError: size or checksum is none; they come from afar and make a file's name.
    """

    url: str
    """Where it is; any that fsspec knows."""
    bytes: int
    """Its size."""
    sha256: str
    """Of its content, in hex."""

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or not _SHA256.fullmatch(str(self.sha256)):
            raise DataError(
                f"the data set's description has no sound size and sha256 of {self.url}; pack again"
            )


class Cache:
    """Picklable; every process may have its own on the same folder.

    Args:
        folder: on a local disk; None takes ``rtl_dist`` in the user's cache folder.
        gigabytes: 10^9 bytes that all files may take; None takes most of what the disk has free.
        redirects: whether they are followed to other servers, too.
    """

    def __init__(
        self,
        folder: str | None = None,
        gigabytes: float | None = None,
        redirects: Redirects = "origin",
    ) -> None:
        self.redirects = redirects
        self.folder = user_cache_folder() if folder is None else Path(folder)
        try:
            self._files = CacheFolder(self.folder)
        except OSError as error:
            raise UserError(
                f"cannot write the cache folder {self.folder}: {error.strerror}; set data.cache_dir"
            ) from error
        if gigabytes is None:
            ours = sum(entry.path.lstat().st_blocks * 512 for entry in self._files.entries())
            free = shutil.disk_usage(self.folder).free + ours
            self.limit = int(free * _SHARE_OF_FREE_SPACE)
        else:
            self.limit = int(gigabytes * _GIGABYTE)

    def touch(self, file: RemoteFile) -> bool:
        """Whether it is here; if so it counts as just used. One of another size was cut or grew on
        this disk, and is let go."""
        now = time.time_ns()  # the kernel's own stamp is too coarse to tell what came first
        with self._named_errors(file):
            try:
                found = self._path(file).lstat()
                if stat.S_ISREG(found.st_mode) and found.st_size != file.bytes:
                    self._forget(file, found)
                    return False
                # not one of another user's in a folder of several: only its owner may
                with suppress(PermissionError):
                    os.utime(self._path(file), ns=(now, now), follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    def forget(self, file: RemoteFile) -> bool:
        """Deletes a file, to be fetched anew at its next use; whether it was here."""
        with self._named_errors(file):
            try:
                self._path(file).unlink()
            except FileNotFoundError:
                return False
        return True

    def read(self, file: RemoteFile, offset: int, size: int) -> bytes:
        """Bytes of the file, which is fetched where it is not here. Raises as ``fetch``."""
        while True:
            self.fetch(file)
            with self._named_errors(file), suppress(FileNotFoundError):  # room was made just now
                descriptor = self._files.open(self._path(file), os.O_RDONLY)
                try:
                    return os.pread(descriptor, size, offset)
                finally:
                    os.close(descriptor)

    def path(self, file: RemoteFile) -> Path:
        """Where the file is, fetched where it is not here. Raises as ``fetch``."""
        while True:
            self.fetch(file)
            with self._named_errors(file), suppress(FileNotFoundError):  # room was made just now
                os.close(self._files.open(self._path(file), os.O_RDONLY))
                return self._path(file)

    def sound_path(self, file: RemoteFile) -> Path:
        """As ``path``, its bytes compared with the checksum: a copy that was damaged on this disk
        is fetched anew."""
        for _ in range(_TRIES):
            path = self.path(file)
            with self._named_errors(file), suppress(FileNotFoundError):  # room was made just now
                with open_regular(path) as copy:
                    if hashlib.file_digest(copy, "sha256").hexdigest() == file.sha256:
                        return path
                    found = os.fstat(copy.fileno())
                LOG.warning("%s was damaged on this disk: fetching it anew", path)
                self._forget(file, found)
        raise RtlDistError(
            f"{self._path(file)} is damaged whenever it is read, though it came whole: set"
            " data.cache_dir to another disk"
        )

    def _forget(self, file: RemoteFile, found: os.stat_result) -> None:
        """Deletes that very file, and not one that another process has fetched meanwhile."""
        with self._files.locked(), suppress(FileNotFoundError):
            if os.path.samestat(found, self._path(file).lstat()):
                self._path(file).unlink()

    def fetch(self, file: RemoteFile, *, wait: bool = True) -> bool:
        """Brings a file here unless it is.

        Args:
            wait: for another process that is fetching it, and for room that others are filling.

        Returns:
            whether it is here now; only without ``wait`` it may not be.

        Raises:
            ShardError: it is missing, or its bytes are not those described.
            RemoteError: the place cannot be reached.
            RtlDistError: there is no room.
        """
        asked_at = time.time_ns()
        with self._named_errors(file):
            while not self.touch(file):
                part = self._lock_part(file, wait=wait)
                if part is not None:
                    try:
                        self._fail_as_another_did(file, asked_at)
                        self._complete(part, file)
                    finally:
                        os.close(part)
                elif not wait:
                    return False
        return True

    @contextmanager
    def _named_errors(self, file: RemoteFile) -> Iterator[None]:
        """An error of the disk, said in one line."""
        try:
            yield
        except OSError as error:
            raise RtlDistError(
                f"cannot keep {file.url} in the cache {self.folder}: {error.strerror}; free some"
                " room, lower data.cache_gb or set data.cache_dir"
            ) from error

    def _lock_part(self, file: RemoteFile, *, wait: bool) -> int | None:
        """A descriptor of the file's part, locked, its room reserved; None where another process
        has it, has finished it, or has the room that it needs."""
        path = self._path(file, PART)
        with self._files.locked():
            is_begun = os.path.lexists(path)
            if not is_begun and (self._path(file).exists() or not self._make_room(file)):
                part = None
            else:
                part = self._open_part(path)
                with suppress(BlockingIOError):
                    if part is not None:
                        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        return part
        if part is None:
            if wait:
                time.sleep(_POLL_S)
            return None
        if wait:
            fcntl.flock(part, fcntl.LOCK_EX)
            if is_at(part, path):
                return part  # who had it has given up, or was killed
        os.close(part)
        return None

    def _open_part(self, path: Path) -> int | None:
        """None: another user of the folder is fetching it."""
        try:
            return self._files.open(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:  # his, which only he can go on with
            return self._files.open(path, os.O_RDWR | os.O_CREAT) if delete(path) else None

    def _complete(self, part: int, file: RemoteFile) -> None:
        """From a locked part to the file, on disk."""
        path = self._path(file, PART)
        try:
            # the second time from nothing: what was left behind may be at fault
            if not _download(part, file, self.redirects) and not _download(
                part, file, self.redirects
            ):
                raise ShardError(
                    f"{file.url} was altered: its bytes have another sha256 than the data set's"
                    " description says; restore it or pack again"
                )
        except (ShardError, RemoteError) as error:
            self._tell_others(file, error)
            if isinstance(error, ShardError):  # else it is taken up later
                path.unlink()
            raise
        except OSError:
            path.unlink()  # a full disk has better uses for its room
            raise
        with self._files.locked():
            os.replace(path, self._path(file))
        self._path(file, _FAILED).unlink(missing_ok=True)
        flush_to_disk(self.folder)

    def _tell_others(self, file: RemoteFile, error: RtlDistError) -> None:
        kind = "shard" if isinstance(error, ShardError) else "remote"
        with suppress(OSError, UserError):  # they will find out for themselves
            path = self._path(file, _FAILED)
            with open(
                self._files.open(path, os.O_WRONLY | os.O_CREAT), "w", encoding="utf-8"
            ) as told:
                told.truncate(0)
                told.write(f"{time.time_ns()} {kind} {error}")

    def _fail_as_another_did(self, file: RemoteFile, asked_at: int) -> None:
        """Raises the error of a process that has failed since ``asked_at``: many that try one after
        the other would take hours to find a server gone."""
        try:
            with open(self._files.open(self._path(file, _FAILED), os.O_RDONLY), "rb") as told:
                content = told.read(_LONGEST_FAILURE).decode("utf-8", "replace")
            at, kind, text = content.split(" ", 2)
            failed_at = int(at)
        except (FileNotFoundError, ValueError):
            return
        if failed_at >= asked_at:
            raise ShardError(text) if kind == "shard" else RemoteError(text)

    def _make_room(self, file: RemoteFile) -> bool:
        """Deletes what was used least recently until ``file`` fits; False if it does not fit beside
        what is being fetched."""
        if file.bytes > self.limit:
            raise RtlDistError(
                f"{file.url} has {file.bytes:,} bytes, the cache {self.folder} may hold"
                f" {self.limit:,}; raise data.cache_gb or pack smaller shards"
            )
        entries = sorted(self._files.entries(), key=lambda entry: entry.used_at)
        too_much = sum(entry.bytes for entry in entries) + file.bytes - self.limit
        if too_much <= 0:
            return True
        idle = [entry for entry in entries if not is_locked(entry.path)]
        if sum(entry.bytes for entry in idle) < too_much:
            return False  # nothing is deleted in vain
        for entry in idle:
            if delete(entry.path):
                too_much -= entry.bytes
                if too_much <= 0:
                    return True
        return False

    def _path(self, file: RemoteFile, suffix: str = "") -> Path:
        return self.folder / f"{file.sha256}.{file.bytes}{suffix}"


def _download(part: int, file: RemoteFile, redirects: Redirects) -> bool:
    """Appends what is missing; if the whole then has another checksum, empties the part and returns
    False."""
    digest = hashlib.sha256()
    have = 0
    while piece := os.pread(part, 1 << 20, have):
        digest.update(piece)
        have += len(piece)
    for piece in read_chunks(file.url, have, file.bytes, redirects):
        view = memoryview(piece)
        digest.update(view)
        while view:
            written = os.pwrite(part, view, have)
            view, have = view[written:], have + written
    if digest.hexdigest() != file.sha256:
        os.ftruncate(part, 0)
        return False
    os.fsync(part)
    return True
