"""What may become a sample: sniffed by content, bounded, decoded once; and shrunk when asked."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image

from rtl_dist.data.decode import MAX_PIXELS, decode
from rtl_dist.data.png_check import SIGNATURE, check_png
from rtl_dist.errors import DataError

# A file may be this large; its bytes are held in memory, once a worker.
MAX_FILE_BYTES = 1 << 30
JPEG_QUALITY = 92

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
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


def checked_image(content: bytes | np.ndarray, short_side: int | None) -> tuple[str, bytes]:
    """An image as it will be packed: (suffix, the file's bytes).

    ``content``: an image file, passed through unchanged unless it must shrink; or uint8 pixels of
    shape (height, width[, 3]), which become a PNG. ``short_side``: images whose short side has more
    pixels are shrunk to it.

    Raises:
        DataError: it is no JPEG, PNG or WebP, or is cut short, too large or not decodable.
    """
    if isinstance(content, np.ndarray):
        content = _encode(Image.fromarray(content), "png")
    suffix = suffix_of(content[:16])
    (width, height), mode = _header(content)
    if width * height > MAX_PIXELS:  # before decoding: a few kilobytes can ask for gigabytes
        raise DataError(f"has {width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
    shrink = short_side is not None and min(width, height) > short_side
    if suffix == "png":
        check_png(content)
    # Shrinking starts from the pixels that training would have seen, grey images staying grey;
    # the WebP decoder knows only colour.
    grey = shrink and mode in _GREY_MODES and suffix != "webp"
    try:
        pixels = decode(content, 1 if grey else 3)
    except DataError as error:
        # torchvision puts its own source files into its messages
        raise DataError(re.sub(r": .*\.cpp:\d+, ", ": ", str(error))) from error
    if not shrink:
        return suffix, content
    array = pixels.permute(1, 2, 0).numpy()
    return suffix, _encode(_shrunk(array[:, :, 0] if grey else array, short_side or 0), suffix)


def _header(content: bytes) -> tuple[tuple[int, int], str]:
    """((width, height), Pillow mode) without decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes below our bound, and of EXIF
            with Image.open(io.BytesIO(content), formats=list(_PIL_FORMATS.values())) as image:
                return image.size, image.mode
    except Image.DecompressionBombError as error:
        raise DataError(f"has more than the {MAX_PIXELS:,} pixels allowed") from error
    # Pillow's readers let a broken header out as any of these
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError) as error:
        raise DataError("has a header that cannot be read") from error


def _shrunk(pixels: np.ndarray, short_side: int) -> Image.Image:
    height, width = pixels.shape[:2]
    scale = short_side / min(width, height)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)  # antialiased


def _encode(image: Image.Image, suffix: str) -> bytes:
    file = io.BytesIO()
    options = {} if suffix == "png" else {"quality": JPEG_QUALITY}
    image.save(file, _PIL_FORMATS[suffix], **options)
    return file.getvalue()
