"""A WebP's header, found as libwebp finds it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.foreign import require_allowed, require_few_pieces
from rtl_dist.data.images.header import Header

_RIFF_BYTES = 12
_SIDE_BITS = 14
_SIDE = (1 << _SIDE_BITS) - 1
_ANIMATED = 0x02


def webp_header(content: bytes) -> Header:
    """See ``Header``.

    Raises:
        DataError: there is none that libwebp would find, or it claims too much.
    """
    size, exif = None, b""
    for kind, start, end in _chunks(content):
        if kind == b"VP8X" and content[start : start + 1] and content[start] & _ANIMATED:
            raise DataError("cannot be decoded: it is an animation, not one picture")
        if kind == b"EXIF" and not exif:
            exif = content[start:end].removeprefix(b"Exif\0\0")
        if size is None and kind in (b"VP8 ", b"VP8L"):
            size = _size(kind, content[start : start + 10])
        if size is None and kind != b"VP8X" and start == _RIFF_BYTES + 8:
            break  # only VP8X may announce that others come first
    if size is None:
        raise DataError("cannot be decoded: a WebP without a header")
    require_allowed(*size)
    return Header(*size, is_grey=False, depth=8, exif=exif)


def _size(kind: bytes, head: bytes) -> tuple[int, int] | None:
    """(width, height); None: that is no picture."""
    if kind == b"VP8 ":
        if len(head) < 10 or head[3:6] != b"\x9d\x01\x2a":
            return None
        width, height = struct.unpack_from("<HH", head, 6)
        return width & _SIDE, height & _SIDE
    if len(head) < 5 or head[0] != 0x2F:
        return None
    (bits,) = struct.unpack_from("<I", head, 1)
    return (bits & _SIDE) + 1, (bits >> _SIDE_BITS & _SIDE) + 1


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk's content."""
    at, number = _RIFF_BYTES, 0
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        yield kind, at + 8, at + 8 + size
        at += 8 + size + size % 2
        number += 1
        require_few_pieces(number)
