"""Whether a PNG's image data is whole, found out before libpng is let near it.

torchvision 0.29's PNG decoder ends the whole process (a segmentation fault, "libpng error: ...")
at any fault inside the image data, so no ``except`` can catch what this module finds. Bytes that
were packed by us, or are checked by their crc32 against such a pack, need no second look.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from rtl_dist.core.errors import DataError

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Samples a pixel by colour type, and the bit depths that type may have.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PALETTE = 3
# Adam7: each pass's first column and row, and its steps across and down.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_HIGHEST_FILTER = 4
BLOCK_BYTES = 1 << 20  # inflated at a time, whatever the picture's size


def check_png(content: bytes) -> None:
    """Walks the chunks, inflates the image data and looks at every row's filter number.

    Raises:
        DataError: the file is cut short, fails a checksum or contradicts its header.
    """
    header = b""
    palette = False
    data = []
    for kind, body in _critical_chunks(content):
        if not header and kind != b"IHDR":
            raise DataError("cannot be decoded: a PNG without a header")
        if kind == b"IHDR":
            header = body
        elif kind == b"PLTE":
            palette = True
        elif kind == b"IDAT":
            data.append(body)
    if len(header) != 13:
        raise DataError("cannot be decoded: a PNG without a header")
    width, height, depth, colour, compression, filtering, interlaced = struct.unpack(
        ">IIBBBBB", header
    )
    if not (
        width
        and height
        and depth in _DEPTHS.get(colour, ())
        and (compression, filtering) == (0, 0)
        and interlaced <= 1
        and (palette or colour != _PALETTE)
    ):
        raise DataError("cannot be decoded: its PNG header contradicts itself")
    row_sizes = list(_rows(width, height, depth * _CHANNELS[colour], bool(interlaced)))
    _check_data(b"".join(data), row_sizes)


def _critical_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of each chunk that decoding needs, up to IEND, with its crc checked."""
    position = len(SIGNATURE)
    while True:
        if position + 12 > len(content):
            raise DataError("cannot be decoded: the PNG is cut short")
        (size,) = struct.unpack_from(">I", content, position)
        kind = content[position + 4 : position + 8]
        end = position + 12 + size
        if end > len(content):
            raise DataError("cannot be decoded: the PNG is cut short")
        if not kind[0] & 0x20:  # a capital first letter: critical
            if (
                zlib.crc32(content[position + 4 : end - 4])
                != struct.unpack_from(">I", content, end - 4)[0]
            ):
                raise DataError("cannot be decoded: the PNG fails its own checksum")
            yield kind, content[position + 8 : end - 4]
        if kind == b"IEND":
            return
        position = end


def _rows(width: int, height: int, bits: int, interlaced: bool) -> Iterator[tuple[int, int]]:
    """(rows, bytes a row with its filter byte) of each pass that has any pixels."""
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns = -(-(width - left) // across)
        rows = -(-(height - top) // down)
        if columns > 0 and rows > 0:
            yield rows, 1 + (columns * bits + 7) // 8


def _check_data(data: bytes, passes: list[tuple[int, int]]) -> None:
    inflater, pending, fed = zlib.decompressobj(), b"", 0

    def inflate(most: int) -> bytes:
        """Up to ``most`` bytes more; empty where there are none."""
        nonlocal pending, fed
        piece = b""
        while not (piece or inflater.eof):
            # A block at a time: each call copies what it leaves, which of a whole file would take
            # a time that grows with the square of its size.
            if not pending:
                pending = data[fed : fed + BLOCK_BYTES]
                fed += len(pending)
            is_last = fed == len(data)
            try:
                piece = inflater.decompress(pending, most)
            except zlib.error as error:
                raise DataError("cannot be decoded: the PNG's data is damaged") from error
            pending = inflater.unconsumed_tail
            if is_last:
                break
        return piece

    for rows, row_bytes in passes:
        at_once = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, rows, at_once):
            wanted = min(at_once, rows - first) * row_bytes
            block = bytearray()
            while len(block) < wanted:
                piece = inflate(wanted - len(block))
                if not piece:
                    raise DataError("cannot be decoded: the PNG's data ends early")
                block += piece
            if np.frombuffer(block, np.uint8)[::row_bytes].max() > _HIGHEST_FILTER:
                raise DataError("cannot be decoded: the PNG's data is damaged")
    # The stream must end too, with its checksum: libpng looks for input beyond the last row.
    # Some encoders leave a little too much in it.
    surplus = 0
    while surplus < BLOCK_BYTES and (piece := inflate(BLOCK_BYTES - surplus)):
        surplus += len(piece)
    if not inflater.eof:
        what = "is larger than its header says" if surplus else "ends early"
        raise DataError(f"cannot be decoded: the PNG's data {what}")
