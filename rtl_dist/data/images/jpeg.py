"""A JPEG's header, found as libjpeg finds it, and a bound on the work that the file asks for."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.foreign import MAX_PIXELS, require_allowed, require_few_pieces
from rtl_dist.data.images.header import Header

# Encoders write about ten scans; each goes over the whole picture, whatever few bytes it has.
# libjpeg's own fuzzers stop at 500; of a large picture fewer are let in.
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 64 * MAX_PIXELS

# What libjpeg looks for next: FF and a number. Whatever lies before it is skipped, FF 00 too, and
# markers that stand alone mean nothing.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]", re.DOTALL)
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


def jpeg_header(content: bytes) -> Header:
    """See ``Header``.

    Raises:
        DataError: there is none that libjpeg would find, or decoding would take too much.
    """
    frame: tuple[int, int, int] | None = None
    progressive, exif = False, b""
    for marker, start, end in _segments(content, 2):
        if marker == _APP1:
            # the first of all: photographs carry XMP and thermal data in such segments too
            if not exif and content[start : start + 5] == b"Exif\0":
                exif = content[start + 6 : end]
        elif marker in _FRAMES and frame is None:
            if start + 6 > len(content):
                break
            height, width, components = struct.unpack_from(">HHB", content, start + 1)
            frame, depth = (width, height, components), content[start]
            progressive = marker in _PROGRESSIVE
        elif marker == _START_OF_SCAN:
            if frame is None or start >= len(content):
                break
            width, height, components = frame
            if not width * height:
                raise DataError(f"cannot be decoded: its header says {width} x {height} pixels")
            require_allowed(width, height)
            if progressive or content[start] < components:
                _check_scans(content, end, width * height)
            return Header(width, height, components == 1, depth, exif)
    raise DataError("cannot be decoded: a JPEG without a header")


def _check_scans(content: bytes, at: int, pixels: int) -> None:
    """at: where the first scan's data begins."""
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // pixels)
    if content.count(b"\xff\xda", at) < most:
        return
    # as many may stand in other segments, or behind the picture's end
    scans = 1
    for marker, _, _ in _segments(content, at):
        scans += marker == _START_OF_SCAN
        if scans > most:
            raise DataError(
                f"cannot be decoded: it has more than {most} scans, made to cost time; save it anew"
            )


def _segments(content: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment that libjpeg may look at, up to the end of the image."""
    number = 0
    while found := _MARKER.search(content, at):
        number += 1
        require_few_pieces(number)
        at = found.end()
        marker = content[at - 1]
        if marker == _END_OF_IMAGE:
            return
        if marker >= 0xC0 and marker != _START_OF_IMAGE:  # else libjpeg gives up
            end = at + max(2, content[at] << 8 | content[at + 1]) if at + 1 < len(content) else at
            yield marker, at + 2, end
            at = end
