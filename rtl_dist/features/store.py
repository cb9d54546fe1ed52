"""Features on disk: one folder a view of a split, whole or not there, found again by its key.

A folder holds ``features.bin`` (num_samples, ...), ``used.npy`` and ``description.json``, which has
the checksum of each block and is what makes the folder whole. All ranks write their own blocks of a
folder under a temporary name; then it is moved to its key in one step. The least recently used go
when the store is full.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from rtl_dist.core.errors import RtlDistError
from rtl_dist.core.text import readable_size
from rtl_dist.core.whole_folder import (
    GONE,
    INCOMPLETE,
    delete_folder,
    discard_folder,
    incomplete_folder,
    publish_folder,
)

_FEATURES, _USED, _DESCRIPTION = "features.bin", "used.npy", "description.json"
# a user's own are not touched
_OURS = re.compile(f"({re.escape(INCOMPLETE)}|{re.escape(GONE)})*[0-9a-f]{{32}}.*")
_ABANDONED_S = 24 * 3600.0  # a temporary folder that nobody wrote to for so long
_LEFT_FREE = 0.1  # of the disk's free space
_CHUNK = 2**24  # bytes read at a time
_DTYPES = {str(t): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True, kw_only=True)
class ViewShape:
    """num_samples rows of shape ``row`` and ``dtype``, checked in blocks of ``block_size`` rows."""

    num_samples: int
    row: tuple[int, ...]
    dtype: torch.dtype
    block_size: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_samples * (self.row_bytes + 8)


@dataclass(frozen=True, kw_only=True)
class View:
    """A whole view, mapped from disk.

    features: (num_samples, ...). used: int64 (num_samples,), the sample each row really holds
    (another one where a damaged sample was replaced). bad: what the damaged ones suffer from.
    """

    features: torch.Tensor
    used: torch.Tensor
    bad: list[str]


def key_of(content: dict[str, Any]) -> str:
    """Names whatever determines the features; any difference gives another name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class FeatureStore:
    """A folder of views that holds at most ``limit_bytes``."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self._limit = root, limit_bytes

    def has(self, key: str) -> bool:
        return os.path.isfile(self.root / key / _DESCRIPTION)  # False, also where none may look

    def is_clean(self, key: str) -> bool:
        """Whether it is there and no damaged sample was met in it: one may have been mended since,
        which leaves the data set's fingerprint as it is."""
        try:
            return self._describe(key)["bad"] == []
        except (OSError, ValueError, LookupError, TypeError):
            return False

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
            self.root.mkdir(parents=True, exist_ok=True)
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
        self.root.mkdir(parents=True, exist_ok=True)
        self._require_room_beside(keep, shape.num_bytes)
        self._make_room(shape.num_bytes, keep)
        folder = incomplete_folder(self.root / key, shared=True)
        folder.mkdir()
        try:
            with open(folder / _FEATURES, "wb") as file:
                size = max(1, shape.num_samples * shape.row_bytes)
                if hasattr(os, "posix_fallocate"):
                    # a file with holes would meet the full disk when it is written to
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
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
        checksums: list[int],
        used: np.ndarray,
        bad: list[str],
        content: dict[str, Any],
    ) -> None:
        """Makes a folder that all ranks have written whole, and moves it to its key.

        Args:
            checksums: crc32 of each block of features, in order. content: what the key is made of.

        Raises:
            OSError: the disk fails; the folder is gone.
        """
        try:
            np.save(folder / _USED, used)
            description = {
                "num_samples": shape.num_samples,
                "row": list(shape.row),
                "dtype": str(shape.dtype),
                "block_size": shape.block_size,
                "checksums": checksums,
                "used_crc32": zlib.crc32((folder / _USED).read_bytes()),
                "bad": bad,
                "key": content,
            }
            (folder / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
            publish_folder(folder, self.root / key)
        except OSError:
            # another run may have made the same at the same time
            is_there = folder.exists() and self.has(key)
            discard_folder(folder)
            if not is_there:
                raise

    def discard(self, folder: Path) -> None:
        discard_folder(folder)

    def forget(self, key: str) -> None:
        """In one step: what is left of a folder under its key would keep a new one from it."""
        with contextlib.suppress(OSError):
            delete_folder(self.root / key, shared=True)

    def is_sound(self, key: str, *, rank: int, world_size: int) -> bool:
        """Whether this rank's share of the blocks of a view is as it was written."""
        try:
            description = self._describe(key)
            shape = _shape_of(description)
            used = (self.root / key / _USED).read_bytes()
            if zlib.crc32(used) != description["used_crc32"]:
                return False
            blocks = range(0, shape.num_samples, shape.block_size)
            with open(self.root / key / _FEATURES, "rb") as file:
                for number in range(rank, len(blocks), world_size):
                    first = blocks[number]
                    last = min(first + shape.block_size, shape.num_samples)
                    found = _crc32(file, first * shape.row_bytes, last * shape.row_bytes)
                    if found != description["checksums"][number]:
                        return False
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
            return False
        return True

    def open(self, key: str) -> View:
        """A view that ``is_sound``, mapped; it is the most recently used then."""
        folder = self.root / key
        description = self._describe(key)
        shape = _shape_of(description)
        with contextlib.suppress(OSError):  # another user's
            os.utime(folder)
        # copy on write: torch has no read-only tensors
        flat = np.memmap(folder / _FEATURES, dtype=np.uint8, mode="c")
        features = torch.from_numpy(flat)[: shape.num_samples * shape.row_bytes]
        return View(
            features=features.view(shape.dtype).view(shape.num_samples, *shape.row),
            used=torch.from_numpy(np.load(folder / _USED)),
            bad=list(description["bad"]),
        )

    def _describe(self, key: str) -> dict[str, Any]:
        text = (self.root / key / _DESCRIPTION).read_text(encoding="utf-8")
        description: dict[str, Any] = json.loads(text)
        return description

    def _views(self) -> list[tuple[float, int, Path]]:
        """(when last used or written to, bytes, folder) of every view, the oldest first."""
        found = []
        for folder in self.root.iterdir():
            if not _OURS.fullmatch(folder.name):
                continue
            try:
                files = [path.stat() for path in folder.iterdir()]
                used_at = max(stat.st_mtime for stat in (folder.stat(), *files))
                found.append((used_at, sum(stat.st_size for stat in files), folder))
            except (FileNotFoundError, NotADirectoryError):
                continue  # another run gave it up just now; or it is no view
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


def write_block(folder: Path, first: int, rows: torch.Tensor) -> int:
    """Writes rows from number ``first`` on into a reserved folder; returns their crc32.

    Raises:
        OSError: the disk fails.
    """
    content = rows.contiguous().view(-1).view(torch.uint8).numpy().data
    # not for reading, too: two nodes' blocks may lie in one page
    with open(os.open(folder / _FEATURES, os.O_WRONLY), "wb") as file:
        offset = first * (len(content) // max(1, len(rows)))
        done = 0
        while done < len(content):
            done += os.pwrite(file.fileno(), content[done:], offset + done)
    return zlib.crc32(content)


def _crc32(file: BinaryIO, start: int, end: int) -> int:
    """Of a file's bytes from start to end, or to where it ends."""
    file.seek(start)
    crc = 0
    while chunk := file.read(min(_CHUNK, end - file.tell())):
        crc = zlib.crc32(chunk, crc)
    return crc


def _shape_of(description: dict[str, Any]) -> ViewShape:
    return ViewShape(
        num_samples=description["num_samples"],
        row=tuple(description["row"]),
        dtype=_DTYPES[description["dtype"]],
        block_size=description["block_size"],
    )


class _NoStoreError(RtlDistError):
    """Features cannot be kept; known to all ranks."""
