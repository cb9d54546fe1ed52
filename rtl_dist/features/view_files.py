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
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from rtl_dist.core.regular_files import open_regular, regular_descriptor
from rtl_dist.data.loading.blocks import blocks_of_rank
from rtl_dist.features.seal import Seal
from rtl_dist.features.view import View, ViewShape, as_stored, map_features

_FEATURES, _USED, _DESCRIPTION = FILES = ("features.bin", "used.npy", "description.json")
_MOST_HEADER = 4096  # bytes of an array's file before its values
CHUNK_BYTES = 2**24  # bytes read at a time
_DTYPES = {str(t): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


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
    content = as_stored(rows).view(-1).view(torch.uint8).numpy().data
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
        mapping, features = map_features(file, shape)
    return View(
        features=features,
        used=torch.from_numpy(_read_used(folder, description, None)),
        bad=list(description["bad"]),
        mapping=mapping,
    )


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
