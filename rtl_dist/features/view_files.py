"""The files of one view: what they hold, and whether that is still as it was written.

A folder holds ``features.bin`` (num_samples, ...), ``used.npy`` (the sample that each row is of)
and ``description.json`` (their shape and checksums), which is what makes the folder whole.
Activations, rows of (C, H, W), lie there as (H, W, C): as the network takes them, channels-last, so
that a row is copied whole to where it is used.

What the description says of a view is compared with what is expected (``fits``); who made it is
known by its ``Seal``, and whether that counts is the store's to say.
"""

from __future__ import annotations

import hmac
import io
import json
import math
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch

from rtl_dist.core.regular_files import open_regular, regular_descriptor
from rtl_dist.data.loading.blocks import blocks_of_rank
from rtl_dist.features.seal import Seal

_FEATURES, _USED, _DESCRIPTION = FILES = ("features.bin", "used.npy", "description.json")
_MOST_HEADER = 4096  # bytes of an array's file before its values
_OF_ACTIVATIONS = 3  # dimensions of a row
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
    it changes no file. Of activations it is channels-last."""
    used: torch.Tensor
    """int64 (num_samples,): the sample that each row really is of, another one where a damaged
    sample was replaced."""
    bad: list[str]
    """What each damaged sample suffers from."""
    mapping: mmap.mmap | None = field(default=None, repr=False)
    """That the features lie in; None of one in memory."""

    def will_be_read_at_random(self) -> None:
        """Has the disk bring what is asked for and nothing besides: of a view larger than memory,
        what is read ahead (128 KiB, on some disks 8 MiB) is gone before it is used."""
        if self.mapping is not None and hasattr(mmap, "MADV_RANDOM"):
            self.mapping.madvise(mmap.MADV_RANDOM)

    @cached_property
    def rows(self) -> np.ndarray:
        """uint8 (num_samples, bytes), the features of each image as they lie in memory."""
        stored = _as_stored(self.features)
        raw: np.ndarray = stored.view(len(stored), -1).view(torch.uint8).numpy()
        return raw


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


class BlockSums(NamedTuple):
    """Of the bytes of a block of features."""

    crc32: int
    """For everybody."""
    sealed: str
    """For who has the seal's secret."""


def write_block(folder: Path, first: int, rows: torch.Tensor, seal: Seal) -> BlockSums:
    """Writes rows from number ``first`` on into a folder with room.

    Raises:
        OSError: the disk fails.
    """
    content = _as_stored(rows).view(-1).view(torch.uint8).numpy().data
    # not for reading, too: two nodes' blocks may lie in one page
    with open(regular_descriptor(folder / _FEATURES, os.O_WRONLY), "wb") as file:
        offset = first * (len(content) // max(1, len(rows)))
        done = 0
        while done < len(content):
            done += os.pwrite(file.fileno(), content[done:], offset + done)
    return BlockSums(zlib.crc32(content), seal.of_bytes([content]))


def complete_view(
    folder: Path,
    shape: ViewShape,
    *,
    checksums: list[BlockSums],
    used: np.ndarray,
    bad: list[str],
    content: dict[str, Any],
    seal: Seal,
) -> None:
    """Writes what makes a folder whole, once all of its blocks are written.

    Args:
        checksums: of each block of features, in order.
        used: see ``View``.
        bad: see ``View``.
        content: what the view's key is made of.

    Raises:
        OSError: the disk fails.
    """
    np.save(folder / _USED, used)
    raw_used = (folder / _USED).read_bytes()
    description = _describe_shape(shape) | {
        "checksums": [sums.crc32 for sums in checksums],
        "used_crc32": zlib.crc32(raw_used),
        "bad": bad,
        "key": content,
        "sealed_by": seal.name,
        "sealed_sums": [sums.sealed for sums in checksums],
        "used_sealed": seal.of_bytes([raw_used]),
    }
    description["seal"] = seal.of_object(description)
    (folder / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether it is there; False, also where none may look."""
    return os.path.isfile(folder / _DESCRIPTION) and not folder.is_symlink()


def is_clean(folder: Path) -> bool:
    """Whether it is whole and no damaged sample was met in it."""
    try:
        return bool(_describe(folder)["bad"] == [])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def fits(folder: Path, shape: ViewShape, content: dict[str, Any]) -> bool:
    """Whether its description is of the view that is expected: as large, and made of the same."""
    try:
        description = _describe(folder)
        expected = _describe_shape(shape) | {"key": json.loads(json.dumps(content))}
        return all(description[key] == value for key, value in expected.items())
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def is_sealed(folder: Path, seal: Seal) -> bool:
    """Whether the seal's user made the view, and its description is as he wrote it."""
    try:
        description = _describe(folder)
        found = str(description.pop("seal"))
        return hmac.compare_digest(found, seal.of_object(description))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def is_sound(folder: Path, seal: Seal, *, rank: int, world_size: int) -> bool:
    """Whether this rank's share of the blocks is as it was written: by the sums that only the
    seal's user can make, where he made the view."""
    try:
        description = _describe(folder)
        is_ours = description.get("sealed_by") == seal.name
        if is_ours and not is_sealed(folder, seal):
            return False
        shape = _shape_of(description)
        _read_used(folder, description, seal if is_ours else None)
        blocks = blocks_of_rank(
            shape.num_samples, shape.block_size, rank=rank, world_size=world_size
        )
        with open_regular(folder / _FEATURES) as file:
            for first in blocks:
                last = min(first + shape.block_size, shape.num_samples)
                chunks = _chunks(file, first * shape.row_bytes, last * shape.row_bytes)
                number = first // shape.block_size
                if is_ours:
                    is_right = seal.of_bytes(chunks) == description["sealed_sums"][number]
                else:
                    is_right = _crc32(chunks) == description["checksums"][number]
                if not is_right:
                    return False
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError):
        return False
    except RecursionError:
        return False
    return True


def open_view(folder: Path) -> View:
    """A view that ``is_sound``, mapped."""
    description = _describe(folder)
    shape = _shape_of(description)
    with open_regular(folder / _FEATURES) as file:
        # copy on write: torch has no read-only tensors
        flat = np.memmap(file, dtype=np.uint8, mode="c")
    stored = torch.from_numpy(flat)[: shape.num_samples * shape.row_bytes]
    return View(
        features=as_features(stored.view(shape.num_samples, -1), shape.row, shape.dtype),
        used=torch.from_numpy(_read_used(folder, description, None)),
        bad=list(description["bad"]),
        mapping=cast(mmap.mmap, flat.base),
    )


def as_features(rows: torch.Tensor, row: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What rows of a view's bytes are: (n, ...) in the same memory.

    Args:
        rows: uint8 (n, bytes).
        row: see ``ViewShape``.
    """
    values = rows.view(dtype)
    if len(row) != _OF_ACTIVATIONS:
        return values.view(len(rows), *row)
    channels, height, width = row
    return values.view(len(rows), height, width, channels).permute(0, 3, 1, 2)


def _as_stored(features: torch.Tensor) -> torch.Tensor:
    """The same values in the order in which they lie in a file."""
    if features.ndim == 1 + _OF_ACTIVATIONS:
        features = features.permute(0, 2, 3, 1)
    return features.contiguous()


def _read_used(folder: Path, description: dict[str, Any], seal: Seal | None) -> np.ndarray:
    """int64 (num_samples,).

    Raises:
        ValueError: it is not what was written. OSError: it cannot be read.
    """
    expected = description["num_samples"]
    with open_regular(folder / _USED) as file:
        if os.fstat(file.fileno()).st_size > expected * 8 + _MOST_HEADER:
            raise ValueError("too long")
        raw = file.read()
    is_right = zlib.crc32(raw) == description["used_crc32"]
    if not is_right or (seal and seal.of_bytes([raw]) != description["used_sealed"]):
        raise ValueError("altered")
    used: np.ndarray = np.load(io.BytesIO(raw), allow_pickle=False)
    if used.dtype != np.int64 or used.shape != (expected,):
        raise ValueError("of another shape")
    if used.size and not 0 <= used.min() <= used.max() < expected:
        raise ValueError("out of range")
    return used


def _describe(folder: Path) -> dict[str, Any]:
    """
    Raises:
        OSError, ValueError, RecursionError: it is missing, or none.
    """
    with open_regular(folder / _DESCRIPTION) as file:
        description = json.loads(file.read())
    if not isinstance(description, dict):
        raise ValueError("no object")
    return description


def _describe_shape(shape: ViewShape) -> dict[str, Any]:
    return {
        "num_samples": shape.num_samples,
        "row": list(shape.row),
        "dtype": str(shape.dtype),
        "block_size": shape.block_size,
    }


def _shape_of(description: dict[str, Any]) -> ViewShape:
    return ViewShape(
        num_samples=description["num_samples"],
        row=tuple(description["row"]),
        dtype=_DTYPES[description["dtype"]],
        block_size=description["block_size"],
    )


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """A file's bytes from start to end, or to where it ends."""
    file.seek(start)
    while chunk := file.read(min(CHUNK_BYTES, end - file.tell())):
        yield chunk


def _crc32(chunks: Iterable[bytes]) -> int:
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return crc
