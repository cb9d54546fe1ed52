"""What may become a sample: sniffed by content, bounded, decoded once; and shrunk when asked."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from rtl_dist.data.images.decode import decode
from rtl_dist.data.images.foreign import PIL_FORMATS, require_decodable

# A file may be this large; its bytes are held in memory, once a worker.
MAX_FILE_BYTES = 1 << 30
JPEG_QUALITY = 92

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")


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
    suffix, size, mode = require_decodable(content)
    shrink = short_side is not None and min(size) > short_side
    # Shrinking starts from the pixels that training would have seen, grey images staying grey;
    # the WebP decoder knows only colour.
    grey = shrink and mode in _GREY_MODES and suffix != "webp"
    pixels = decode(content, 1 if grey else 3)
    if not shrink:
        return suffix, content
    array = pixels.permute(1, 2, 0).numpy()
    return suffix, _encode(_shrunk(array[:, :, 0] if grey else array, short_side or 0), suffix)


def _shrunk(pixels: np.ndarray, short_side: int) -> Image.Image:
    height, width = pixels.shape[:2]
    scale = short_side / min(width, height)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)  # antialiased


def _encode(image: Image.Image, suffix: str) -> bytes:
    file = io.BytesIO()
    options = {} if suffix == "png" else {"quality": JPEG_QUALITY}
    image.save(file, PIL_FORMATS[suffix], **options)
    return file.getvalue()
