"""The views on disk: one folder each, whole or not there, found again by its key.

All ranks write their own blocks of a folder under a temporary name; then it is moved to its key in
one step. The least recently used go when the store is full.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.shared_folder import is_shared
from rtl_dist.core.text import readable_size
from rtl_dist.core.whole_folder import (
    GONE,
    INCOMPLETE,
    delete_folder,
    discard_folder,
    incomplete_folder,
    publish_folder,
)
from rtl_dist.features.seal import Seal
from rtl_dist.features.view import View, ViewShape
from rtl_dist.features.view_files import (
    FILES,
    BlockSums,
    complete_view,
    fits,
    is_clean,
    is_sealed,
    is_sound,
    is_whole,
    open_view,
    reserve_room,
)

# a user's own are not touched
_OURS = re.compile(rf"({re.escape(INCOMPLETE)}|{re.escape(GONE)})*[0-9a-f]{{32}}(\.\d+)*")
_ABANDONED_S = 24 * 3600.0  # a temporary folder that nobody wrote to for so long
_LEFT_FREE = 0.1  # of the disk's free space


class FeatureStore:
    """A folder of views that holds at most ``limit_bytes``."""

    def __init__(self, root: Path, limit_bytes: int, seal: Seal | None = None) -> None:
        """
        Args:
            seal: of the user; None: this object knows only its own views in a folder that others
                can write.
        """
        self.root, self._limit = root, limit_bytes
        self.seal = seal or Seal(os.urandom(32))

    def has(self, key: str) -> bool:
        return is_whole(self.root / key)

    def is_clean(self, key: str) -> bool:
        """Whether it is there and no damaged sample was met in it: one may have been mended since,
        which leaves the data set's fingerprint as it is."""
        return is_clean(self.root / key)

    def why_no_room(self, num_bytes: int, *, keep: set[str]) -> str | None:
        """Why so much cannot be added beside the views ``keep``, whatever else is given up; None if
        it can."""
        try:
            kept = sum(size for _, size, folder in self._views() if folder.name in keep)
        except OSError:
            kept = 0  # there is no store yet
        if kept + num_bytes > self._limit:
            needed = readable_size(kept + num_bytes)
            return f"{needed} are more than features.cache_gb allows ({readable_size(self._limit)})"
        try:
            self.root.mkdir(mode=0o775, parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free * (1 - _LEFT_FREE) + self._held()
        except OSError as error:
            return f"{self.root} cannot be used ({error.strerror})"
        if num_bytes > free:
            return f"{readable_size(num_bytes)} are more than {self.root} has room for"
        return None

    def reserve(self, key: str, shape: ViewShape, *, keep: set[str]) -> Path:
        """A temporary folder with room on the disk for a view; ``keep`` names views not to give up.

        Raises:
            OSError: no room, or no permission.
        """
        self.root.mkdir(mode=0o775, parents=True, exist_ok=True)
        self._require_room_beside(keep, shape.num_bytes)
        self._make_room(shape.num_bytes, keep)
        folder = incomplete_folder(self.root / key, shared=True)
        folder.mkdir(mode=0o755)
        try:
            reserve_room(folder, shape)
        except OSError:
            discard_folder(folder)
            raise
        return folder

    def publish(
        self,
        folder: Path,
        key: str,
        shape: ViewShape,
        *,
        checksums: list[BlockSums],
        used: np.ndarray,
        bad: list[str],
        content: dict[str, Any],
    ) -> None:
        """Makes a folder that all ranks have written whole (see ``complete_view``), and moves it to
        its key.

        Raises:
            OSError: the disk fails; the folder is gone.
        """
        try:
            complete_view(
                folder,
                shape,
                checksums=checksums,
                used=used,
                bad=bad,
                content=content,
                seal=self.seal,
            )
            publish_folder(folder, self.root / key)
        except OSError:
            # another run may have made the same at the same time
            is_there = folder.exists() and self.has(key) and self.believes(key, shape, content)
            discard_folder(folder)
            if not is_there:
                raise

    def discard(self, folder: Path) -> None:
        discard_folder(folder)

    def forget(self, key: str) -> None:
        """In one step: what is left of a folder under its key would keep a new one from it."""
        with contextlib.suppress(OSError):
            delete_folder(self.root / key, shared=True)

    def believes(self, key: str, shape: ViewShape, content: dict[str, Any]) -> bool:
        """Whether a view is described as the one that is expected; and, in a folder that others can
        write, was made by this user."""
        folder = self.root / key
        try:
            is_ours = is_sealed(folder, self.seal)
            return fits(folder, shape, content) and (is_ours or not is_shared(self.root))
        except OSError:
            return False

    def is_another_users(self, key: str) -> bool:
        try:
            return (self.root / key).lstat().st_uid != os.geteuid()
        except OSError:
            return False

    def is_sound(self, key: str, *, rank: int, world_size: int) -> bool:
        """Whether this rank's share of the blocks of a view is as it was written."""
        return is_sound(self.root / key, self.seal, rank=rank, world_size=world_size)

    def open(self, key: str) -> View:
        """A view that ``is_sound``, mapped; it is the most recently used then."""
        view = open_view(self.root / key)
        with contextlib.suppress(OSError):  # another user's
            os.utime(self.root / key)
        return view

    def _views(self) -> list[tuple[float, int, Path]]:
        """(when last used or written to, bytes, folder) of every view, the oldest first."""
        found = []
        for folder in self.root.iterdir():
            if not _OURS.fullmatch(folder.name) or folder.is_symlink():
                continue
            try:
                files = list(folder.iterdir())
                if any(path.name not in FILES for path in files):
                    continue  # a user's own that is called alike
                stats = [path.lstat() for path in files]
                used_at = max(stat.st_mtime for stat in (folder.stat(), *stats))
                found.append((used_at, sum(stat.st_size for stat in stats), folder))
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue  # another run gave it up just now; or it is no view of ours
        return sorted(found)

    def _held(self) -> int:
        return sum(size for _, size, _ in self._views())

    def _make_room(self, num_bytes: int, keep: set[str]) -> None:
        views = self._views()
        held = sum(size for _, size, _ in views)
        for used_at, size, folder in views:
            if folder.name in keep or _is_being_written(folder, used_at):
                continue
            free = shutil.disk_usage(self.root).free * (1 - _LEFT_FREE)
            if held + num_bytes <= self._limit and num_bytes <= free:
                return
            self.forget(folder.name)
            held -= size

    def _require_room_beside(self, keep: set[str], num_bytes: int) -> None:
        """What is needed now, and what other runs are writing, is not given up for more."""
        kept = sum(
            size
            for used_at, size, folder in self._views()
            if folder.name in keep or _is_being_written(folder, used_at)
        )
        if kept + num_bytes > self._limit:
            raise OSError(
                errno.ENOSPC,
                f"{readable_size(kept + num_bytes)} would be in use at once, features.cache_gb"
                f" allows {readable_size(self._limit)}",
            )


def _is_being_written(folder: Path, used_at: float) -> bool:
    is_new = time.time() - used_at < _ABANDONED_S
    return folder.name.startswith(INCOMPLETE) and is_new
