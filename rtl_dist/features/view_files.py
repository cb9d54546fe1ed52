"""The files of one view: what they hold, and whether that is still as it was written.

A folder holds ``features.bin`` (num_samples, ...), ``used.npy`` (the sample that each row is of)
and ``description.json`` (their shape and checksums), which is what makes the folder whole.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from rtl_dist.data.loading.blocks import blocks_of_rank

_FEATURES, _USED, _DESCRIPTION = "features.bin", "used.npy", "description.json"
CHUNK_BYTES = 2**24  # bytes read at a time
_DTYPES = {str(t): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True, kw_only=True)
class ViewShape:
    """How large a view is."""

    num_samples: int
    """Rows, one an image."""
    row: tuple[int, ...]
    """Shape of what the frozen part makes of one image."""
    dtype: torch.dtype
    """Of a row's values; a floating point one."""
    block_size: int
    """Rows that are computed, written and checked together; the last block may have fewer."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_samples * (self.row_bytes + 8)


@dataclass(frozen=True, kw_only=True)
class View:
    """A whole view, mapped from disk."""

    features: torch.Tensor
    """(num_samples, ...) in the precision that the frozen part has, on the host; what is changed in
    it changes no file."""
    used: torch.Tensor
    """int64 (num_samples,): the sample that each row really is of, another one where a damaged
    sample was replaced."""
    bad: list[str]
    """What each damaged sample suffers from."""


def reserve_room(folder: Path, shape: ViewShape) -> None:
    """Takes the room that a view's features need, so that a full disk is met before they are made.

    Raises:
        OSError: there is none.
    """
    with open(folder / _FEATURES, "wb") as file:
        size = max(1, shape.num_samples * shape.row_bytes)
        if hasattr(os, "posix_fallocate"):
            # a file with holes would meet the full disk when it is written to
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def write_block(folder: Path, first: int, rows: torch.Tensor) -> int:
    """Writes rows from number ``first`` on into a folder with room; returns their crc32.

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


def complete_view(
    folder: Path,
    shape: ViewShape,
    *,
    checksums: list[int],
    used: np.ndarray,
    bad: list[str],
    content: dict[str, Any],
) -> None:
    """Writes what makes a folder whole, once all of its blocks are written.

    Args:
        checksums: crc32 of each block of features, in order.
        used: see ``View``.
        bad: see ``View``.
        content: what the view's key is made of.

    Raises:
        OSError: the disk fails.
    """
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


def is_whole(folder: Path) -> bool:
    return os.path.isfile(folder / _DESCRIPTION)  # False, also where none may look


def is_clean(folder: Path) -> bool:
    """Whether it is whole and no damaged sample was met in it."""
    try:
        return _describe(folder)["bad"] == []
    except (OSError, ValueError, LookupError, TypeError):
        return False


def is_sound(folder: Path, *, rank: int, world_size: int) -> bool:
    """Whether this rank's share of the blocks is as it was written."""
    try:
        description = _describe(folder)
        shape = _shape_of(description)
        used = (folder / _USED).read_bytes()
        if zlib.crc32(used) != description["used_crc32"]:
            return False
        blocks = blocks_of_rank(
            shape.num_samples, shape.block_size, rank=rank, world_size=world_size
        )
        with open(folder / _FEATURES, "rb") as file:
            for first in blocks:
                last = min(first + shape.block_size, shape.num_samples)
                found = _crc32(file, first * shape.row_bytes, last * shape.row_bytes)
                if found != description["checksums"][first // shape.block_size]:
                    return False
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        return False
    return True


def open_view(folder: Path) -> View:
    """A view that ``is_sound``, mapped."""
    description = _describe(folder)
    shape = _shape_of(description)
    # copy on write: torch has no read-only tensors
    flat = np.memmap(folder / _FEATURES, dtype=np.uint8, mode="c")
    features = torch.from_numpy(flat)[: shape.num_samples * shape.row_bytes]
    return View(
        features=features.view(shape.dtype).view(shape.num_samples, *shape.row),
        used=torch.from_numpy(np.load(folder / _USED)),
        bad=list(description["bad"]),
    )


def _describe(folder: Path) -> dict[str, Any]:
    text = (folder / _DESCRIPTION).read_text(encoding="utf-8")
    description: dict[str, Any] = json.loads(text)
    return description


def _shape_of(description: dict[str, Any]) -> ViewShape:
    return ViewShape(
        num_samples=description["num_samples"],
        row=tuple(description["row"]),
        dtype=_DTYPES[description["dtype"]],
        block_size=description["block_size"],
    )


def _crc32(file: BinaryIO, start: int, end: int) -> int:
    """Of a file's bytes from start to end, or to where it ends."""
    file.seek(start)
    crc = 0
    while chunk := file.read(min(CHUNK_BYTES, end - file.tell())):
        crc = zlib.crc32(chunk, crc)
    return crc
