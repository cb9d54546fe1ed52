"""What may become a sample: decoded once, and shrunk when asked."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from rtl_dist.data.images.decode import decode_file
from rtl_dist.data.images.doubts import doubt_of

JPEG_QUALITY = 92

_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class CheckedImage(NamedTuple):
    """An image as it will be packed."""

    suffix: str
    """``jpg``, ``png`` or ``webp``."""
    content: bytes
    """The file's bytes."""
    doubt: str
    """Why its pixels may not be what was meant; empty: nothing speaks against them."""


def checked_image(content: bytes | np.ndarray, short_side: int | None) -> CheckedImage:
    """An image that can be decoded, for a sample.

    ``content``: an image file, passed through unchanged unless it must shrink; or uint8 pixels of
    shape (height, width[, 3]), which become a PNG. ``short_side``: images whose short side has more
    pixels are shrunk to it.

    Raises:
        DataError: it is no JPEG, PNG or WebP, or is cut short, too large or not decodable.
    """
    if isinstance(content, np.ndarray):
        content = _encode(Image.fromarray(content), "png")
    decoded = decode_file(content, 3)
    doubt = doubt_of(decoded)
    height, width = decoded.pixels.shape[1:]
    if short_side is None or min(height, width) <= short_side:
        return CheckedImage(decoded.suffix, content, doubt)
    # Shrinking starts from the pixels that training would have seen, grey images staying grey.
    array = decoded.pixels.permute(1, 2, 0).numpy()
    shrunk = _shrunk(array[:, :, 0] if decoded.header.is_grey else array, short_side)
    return CheckedImage(decoded.suffix, _encode(shrunk, decoded.suffix), doubt)


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
