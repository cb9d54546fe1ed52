"""Any tar's members, and proof that all of them were seen.

Python's ``tarfile`` knows the formats (GNU long names, PAX, ustar prefixes), but takes a damaged
header, or a cut between two members, for the end of the archive; here both are errors.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rtl_dist.core.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
# What may be read to understand one member's headers: a PAX header can claim gigabytes.
_MAX_HEADER_BYTES = 64 << 10
_CHUNK = 1 << 20

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}
# tarfile lets these out of headers that pass their checksum and still make no sense
_NONSENSE = (
    tarfile.TarError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar that is no folder."""

    name: str
    """Its whole path in the tar."""
    offset: int
    """Where its content begins in the tar, in bytes; means nothing unless it is a plain file."""
    size: int
    """Of its content, in bytes; the same holds."""
    oddity: str
    """What it is if no plain file (``"a symbolic link"``), else empty."""


def walk(path: Path) -> Iterator[Member]:
    """Every member in the tar's order, one in memory at a time; contents are skipped, not read.

    Names that are no UTF-8 come with surrogate escapes.

    Raises:
        DataError: the file is compressed, no tar, damaged, or cut short; says at which byte. It is
            raised on reaching the place, so only a finished walk shows that a tar is whole.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        _check_beginning(file, end)
        headers = _Headers(file)
        at = 0
        try:
            tar = tarfile.TarFile(
                fileobj=_as_any(headers), encoding="utf-8", errors="surrogateescape"
            )
            while (info := _next(tar, headers)) is not None:
                if tar.offset <= at:  # a negative size: the walk would go in circles
                    raise DataError(f"has a damaged header at byte {at:,}")
                if tar.offset > end:
                    raise DataError(
                        f"is cut short: member {info.name!r} at byte {at:,} should reach to byte"
                        f" {tar.offset:,}, the file ends at {end:,}"
                    )
                at = tar.offset
                if not info.isdir():
                    yield Member(info.name, info.offset_data, info.size, _oddity_of(info))
            at = tar.offset
        except _TooLong as error:
            raise DataError(f"has a header at byte {at:,} that claims to be too large") from error
        except _NONSENSE as error:
            _check_whole_block(at, end)
            raise DataError(f"has a damaged header at byte {at:,}") from error
        _check_end(file, at, end)


def member_names(path: Path) -> dict[int, str]:
    """The full name of every plain file in a tar by the offset of its content, in bytes.

    Raises:
        DataError: the tar is damaged, see ``walk``. OSError: it cannot be read.
    """
    return {member.offset: member.name for member in walk(path) if not member.oddity}


class _TooLong(Exception):
    pass


class _Headers:
    """The file as tarfile may see it: so many bytes for one member's headers and no more."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left = _MAX_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise _TooLong
        return self._file.read(size)


def _as_any(headers: _Headers) -> Any:
    return headers


def _next(tar: tarfile.TarFile, headers: _Headers) -> tarfile.TarInfo | None:
    headers.left = _MAX_HEADER_BYTES
    info = tar.next()
    tar.members = []  # type: ignore[attr-defined] # else it keeps them all
    return info


def _oddity_of(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "a sparse file"
    return "" if info.isreg() else _KINDS.get(info.type, f"of the unknown type {info.type!r}")


def _check_beginning(file: BinaryIO, end: int) -> None:
    file.seek(0)
    block = file.read(_BLOCK)
    file.seek(0)
    if not block:
        raise DataError("is empty: even a tar without members has 1,024 bytes")
    for magic, what in _COMPRESSED.items():
        if block.startswith(magic):
            raise DataError(
                f"is compressed ({what}): decompress it, or train on it with data.backend=stream"
                " data.stream_urls=PATTERN"
            )
    if any(block):
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except _NONSENSE as error:
            _check_whole_block(0, end)
            raise DataError("is no tar, or its first header is damaged (byte 0)") from error


def _check_whole_block(at: int, end: int) -> None:
    if end - at < _BLOCK:
        raise DataError(f"is cut short in a header at byte {at:,}: the file ends at {end:,}")


def _check_end(file: BinaryIO, at: int, end: int) -> None:
    """What tarfile took for the end must be zeros, at least a block of them, to the last byte."""
    if at >= end:
        raise DataError(
            f"ends at byte {end:,} without the mark of an archive's end: it was cut between two"
            " members, or its writer was never closed"
        )
    _check_whole_block(at, end)
    file.seek(at)
    if any(file.read(_BLOCK)):
        raise DataError(f"has a damaged header at byte {at:,}")
    position = at + _BLOCK
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            position += len(chunk) - len(rest)
            raise DataError(
                f"has data at byte {position:,}, after the mark of the archive's end at {at:,}"
            )
        position += len(chunk)
