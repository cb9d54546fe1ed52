"""Image files that are not known to be sound: what they are, and whether a decoder may see them."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.png_check import SIGNATURE, check_png

# A decoded image may hold at most this many pixels: a "decompression bomb" of a few kilobytes can
# ask for gigabytes (Pillow's own limit is of the same size).
MAX_PIXELS = 178_956_970

PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_FOREIGN = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
}


def suffix_of(head: bytes) -> str:
    """``jpg``, ``png`` or ``webp`` by a file's first 16 bytes, whatever its name says.

    Raises:
        DataError: it is something else; the message says what when that is known.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(SIGNATURE):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if not head:
        raise DataError("is empty")
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"is {what} file, not a JPEG, PNG or WebP")
    raise DataError("is not a JPEG, PNG or WebP")


def require_known(content: bytes) -> None:
    """The least that must hold before a file from elsewhere is decoded, cheap enough for every read
    (the decoder itself bounds the pixels).

    Raises:
        DataError: it is no JPEG, PNG or WebP, or a PNG that is not whole (on which libpng can end
            the process).
    """
    if suffix_of(content[:16]) == "png":
        check_png(content)


def require_decodable(content: bytes) -> tuple[str, tuple[int, int], str]:
    """(suffix, (width, height), Pillow mode) of an image file that a decoder may be given.

    Raises:
        DataError: it is no JPEG, PNG or WebP, asks for too much memory, or is a PNG that is not
            whole (on which libpng can end the process).
    """
    suffix = suffix_of(content[:16])
    (width, height), mode = _header(content)
    if width * height > MAX_PIXELS:  # before decoding: a few kilobytes can ask for gigabytes
        raise DataError(f"has {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
    if suffix == "png":
        check_png(content)
    return suffix, (width, height), mode


def _header(content: bytes) -> tuple[tuple[int, int], str]:
    """((width, height), Pillow mode) without decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes below our bound, and of EXIF
            with Image.open(io.BytesIO(content), formats=list(PIL_FORMATS.values())) as image:
                return image.size, image.mode
    except Image.DecompressionBombError as error:
        raise DataError(f"has more than the {MAX_PIXELS:,} pixels allowed") from error
    # Pillow's readers let a broken header out as any of these
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError) as error:
        raise DataError("has a header that cannot be read") from error
