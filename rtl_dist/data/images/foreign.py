"""What an image file is by its first bytes, and how much of one is let in."""

from __future__ import annotations

from rtl_dist.core.errors import DataError

# A decoded image may hold at most this many pixels: a "decompression bomb" of a few kilobytes can
# ask for gigabytes (Pillow's own limit is of the same size).
MAX_PIXELS = 178_956_970
# A file may be this large; its bytes are held in memory, once a worker.
MAX_FILE_BYTES = 1 << 30
# And may be of this many pieces (segments, chunks): what is walked one by one takes its time.
MAX_PIECES = 1 << 20

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FOREIGN = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
}
# of the container that HEIC and AVIF share: what stands behind its length and "ftyp"
_BRANDS = {
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC"
    ),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF"),
}


def suffix_of(head: bytes) -> str:
    """``jpg``, ``png`` or ``webp`` by a file's first 16 bytes, whatever its name says.

    Raises:
        DataError: it is something else; the message says what when that is known.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(PNG_SIGNATURE):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if not head:
        raise DataError("is empty")
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"is {what} file, not a JPEG, PNG or WebP")
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        raise DataError(f"is {_BRANDS[head[8:12]]} file, not a JPEG, PNG or WebP")
    raise DataError("is not a JPEG, PNG or WebP")


def require_few_pieces(number: int) -> None:
    """Raises DataError: a file of so many is none that anybody's encoder writes."""
    if number > MAX_PIECES:
        raise DataError(
            f"cannot be decoded: it is of more than {MAX_PIECES:,} pieces, made to cost time"
        )


def require_allowed(width: int, height: int) -> None:
    """Before anything is decoded. Raises DataError: so many pixels are not."""
    if width * height > MAX_PIXELS:
        raise DataError(
            f"has {width} x {height} pixels, more than the {MAX_PIXELS:,} pixels allowed"
        )
