"""A PNG taken apart, checked, and put together anew as one in which libpng can find no fault.

torchvision 0.29's PNG decoder ends the whole process (a segmentation fault, "libpng error: ...")
at any fault inside the image data, and no ``except`` can catch that. So it never sees a file as it
came: its data is inflated here, where damage raises, and handed on stored, in a file that holds
nothing but header, palette and rows. What says how bright the file's numbers are meant (gAMA, sRGB
and their like) stays behind, so that equal numbers are equal pixels, as in every other format.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.foreign import PNG_SIGNATURE, require_allowed, require_few_pieces
from rtl_dist.data.images.header import Header

# Samples a pixel by colour type, and the bit depths that type may have.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_COLOUR, _PALETTE, _ALPHA = 2, 3, 4  # a colour type; _COLOUR and _ALPHA are bits of it
_MOST_PALETTE = 3 * 256
_MOST_SIDE = 1_000_000  # libpng's own
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
_ZLIB_HEADER, _LAST_BLOCK, _STORED_BYTES = b"\x78\x01", b"\x01\0\0\xff\xff", 0xFFFF
BLOCK_BYTES = 1 << 20  # inflated at a time, whatever the picture's size


class PngParts(NamedTuple):
    """What is needed of a file's chunks."""

    width: int
    """Pixels."""
    height: int
    """The same, downwards."""
    depth: int
    """Bits a sample."""
    colour: int
    """The colour type."""
    interlaced: bool
    """In seven passes (Adam7)."""
    palette: bytes
    """Three bytes a colour; empty where the colour type has none."""
    data: bytes
    """The image data, deflated."""
    exif: bytes
    """As in ``Header``."""

    @property
    def header(self) -> Header:
        is_grey = self.colour in (0, _ALPHA)
        return Header(self.width, self.height, is_grey, self.depth, self.exif)


class _Slimmed(NamedTuple):
    """The bytes of each pixel that are looked at: without alpha, and one of two of 16 bits. Rows
    stay filtered, since PNG's filters treat each byte of a pixel by itself."""

    pixel_bytes: int
    """As it is in the file; 0: less than a byte, all of it is kept."""
    kept: slice
    """Of them."""
    depth: int
    """Bits a sample of what is kept."""
    colour: int
    """The colour type of what is kept."""


def plain_png(parts: PngParts, channels: int) -> bytearray:
    """A PNG file of the same picture, for its decoder.

    channels: what it will be decoded to. For 3, and for grey pictures, 16 bits are cut to 8; of
    colour, grey is made from all 16.

    Raises:
        DataError: the image data is damaged, or less or much more than the header says.
    """
    slimmed = _slimmed(parts, channels)
    header = struct.pack(
        ">IIBBBBB", parts.width, parts.height, slimmed.depth, slimmed.colour, 0, 0, parts.interlaced
    )
    plain = bytearray(PNG_SIGNATURE)
    _add_chunk(plain, b"IHDR", header)
    if parts.palette:
        _add_chunk(plain, b"PLTE", parts.palette)
    # stored blocks, as zlib's level 0 makes them, without its quarter of a megabyte of state
    checksum, data = 1, _ZLIB_HEADER
    for rows in _checked_rows(parts):
        kept = _cut(rows, slimmed)
        checksum = zlib.adler32(kept, checksum)
        for first in range(0, len(kept), _STORED_BYTES):
            block = kept[first : first + _STORED_BYTES]
            data += struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF) + block
            _add_chunk(plain, b"IDAT", data)
            data = b""
    _add_chunk(plain, b"IDAT", _LAST_BLOCK + checksum.to_bytes(4, "big"))
    _add_chunk(plain, b"IEND", b"")
    return plain


def png_parts(content: bytes) -> PngParts:
    """Takes a file apart.

    Raises:
        DataError: it is cut short, fails a checksum, contradicts itself or has too many pixels.
    """
    header, palette, exif = b"", b"", b""
    data: list[bytes] = []
    last = b""
    for kind, body in _chunks(content):
        if not header and kind != b"IHDR":
            raise DataError("cannot be decoded: a PNG without a header")
        if kind == b"IDAT":
            if data and last != b"IDAT":
                raise DataError("cannot be decoded: other chunks stand within the PNG's data")
            data.append(body)
        elif kind == b"IHDR" and not header:
            header = body
        elif kind == b"PLTE" and not palette and not data:
            palette = body
        elif kind == b"eXIf":
            exif = exif or body
        elif _is_critical(kind) and kind != b"IEND":
            raise DataError("cannot be decoded: a PNG with chunks that no decoder knows")
        last = kind
    if len(header) != 13:
        raise DataError("cannot be decoded: a PNG without a header")
    width, height, depth, colour, compression, filtering, interlaced = struct.unpack(
        ">IIBBBBB", header
    )
    if colour != _PALETTE:
        palette = b""  # a hint for screens of few colours
    if not (
        width
        and height
        and depth in _DEPTHS.get(colour, ())
        and (compression, filtering) == (0, 0)
        and interlaced <= 1
        and (palette or colour != _PALETTE)
        and len(palette) % 3 == 0
        and len(palette) <= _MOST_PALETTE
    ):
        raise DataError("cannot be decoded: its PNG header contradicts itself")
    require_allowed(width, height)
    if max(width, height) > _MOST_SIDE:
        raise DataError(f"has {width} x {height} pixels, more than {_MOST_SIDE:,} on a side")
    return PngParts(width, height, depth, colour, bool(interlaced), palette, b"".join(data), exif)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of each chunk up to IEND: those that decoding needs, with their crc checked;
    of the others the content of a whole eXIf alone."""
    position = len(PNG_SIGNATURE)
    for number in count():
        require_few_pieces(number)
        if position + 12 > len(content):
            raise DataError("cannot be decoded: the PNG is cut short")
        (size,) = struct.unpack_from(">I", content, position)
        kind = content[position + 4 : position + 8]
        end = position + 12 + size
        if end > len(content):
            raise DataError("cannot be decoded: the PNG is cut short")
        if not kind.isalpha():
            raise DataError("cannot be decoded: the PNG is damaged between its chunks")
        is_needed = _is_critical(kind)
        body = b""
        if is_needed or kind == b"eXIf":
            body = content[position + 8 : end - 4]
            if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(content[end - 4 : end], "big"):
                if is_needed:
                    raise DataError("cannot be decoded: the PNG fails its own checksum")
                body = b""
        yield kind, body
        if kind == b"IEND":
            return
        position = end


def _is_critical(kind: bytes) -> bool:
    return not kind[0] & 0x20  # a capital first letter


def _slimmed(parts: PngParts, channels: int) -> _Slimmed:
    if parts.depth < 8:
        return _Slimmed(0, slice(None), parts.depth, parts.colour)
    sample = parts.depth // 8
    colour = parts.colour if parts.colour == _PALETTE else parts.colour & ~_ALPHA
    kept = _SAMPLES[colour] * sample
    pixel = _SAMPLES[parts.colour] * sample
    if sample == 2 and channels == 1 and colour == _COLOUR:
        return _Slimmed(pixel, slice(0, kept), 16, colour)
    return _Slimmed(pixel, slice(0, kept, sample), 8, colour)


def _cut(rows: np.ndarray, slimmed: _Slimmed) -> bytes:
    """Rows (n, 1 + bytes a row) with their filter bytes, of each pixel what is kept."""
    if len(range(slimmed.pixel_bytes)[slimmed.kept]) == slimmed.pixel_bytes:
        return rows.tobytes()
    pixels = rows[:, 1:].reshape(len(rows), -1, slimmed.pixel_bytes)[:, :, slimmed.kept]
    return np.concatenate([rows[:, :1], pixels.reshape(len(rows), -1)], axis=1).tobytes()


def _add_chunk(file: bytearray, kind: bytes, body: bytes) -> None:
    file += struct.pack(">I4s", len(body), kind)
    file += body
    file += zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big")


def _passes(parts: PngParts) -> Iterator[tuple[int, int]]:
    """(rows, bytes a row with its filter byte) of each pass that has any pixels."""
    bits = parts.depth * _SAMPLES[parts.colour]
    for left, top, across, down in _ADAM7 if parts.interlaced else ((0, 0, 1, 1),):
        columns = -(-(parts.width - left) // across)
        rows = -(-(parts.height - top) // down)
        if columns > 0 and rows > 0:
            yield rows, 1 + (columns * bits + 7) // 8


def _checked_rows(parts: PngParts) -> Iterator[np.ndarray]:
    """All rows, some at a time, uint8 (n, bytes a row)."""
    data = _Inflated(parts.data)
    for rows, row_bytes in _passes(parts):
        at_once = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, rows, at_once):
            block = data.read(min(at_once, rows - first) * row_bytes)
            if max(block[::row_bytes]) > _HIGHEST_FILTER:
                raise DataError("cannot be decoded: the PNG's data is damaged")
            yield np.frombuffer(block, np.uint8).reshape(-1, row_bytes)
    data.finish()


class _Inflated:
    """Deflated data, read a piece at a time.

    Of any window: files say a smaller one than they need, and a decoder that believes them fails.
    """

    def __init__(self, data: bytes) -> None:
        self._inflater, self._data, self._fed, self._pending = zlib.decompressobj(), data, 0, b""

    def read(self, count: int) -> bytes:
        """So many bytes. Raises DataError: there are none, or they are damaged."""
        block = self._some(count)
        if len(block) == count:
            return block
        pieces = bytearray(block)
        while len(pieces) < count:
            piece = self._some(count - len(pieces))
            if not piece:
                raise DataError("cannot be decoded: the PNG's data ends early")
            pieces += piece
        return bytes(pieces)

    def finish(self) -> None:
        """Raises DataError: the stream does not end here, with its checksum. Some encoders leave a
        little too much in it."""
        surplus = 0
        while surplus < BLOCK_BYTES and (piece := self._some(BLOCK_BYTES - surplus)):
            surplus += len(piece)
        if not self._inflater.eof:
            what = "is larger than its header says" if surplus else "ends early"
            raise DataError(f"cannot be decoded: the PNG's data {what}")

    def _some(self, most: int) -> bytes:
        """Up to ``most`` bytes more; empty where there are none."""
        piece = b""
        while not (piece or self._inflater.eof):
            # A block at a time: each call copies what it leaves, which of a whole file would take
            # a time that grows with the square of its size.
            if not self._pending:
                self._pending = self._data[self._fed : self._fed + BLOCK_BYTES]
                self._fed += len(self._pending)
            is_last = self._fed == len(self._data)
            try:
                piece = self._inflater.decompress(self._pending, most)
            except zlib.error as error:
                raise DataError("cannot be decoded: the PNG's data is damaged") from error
            self._pending = self._inflater.unconsumed_tail
            if is_last:
                break
        return piece
