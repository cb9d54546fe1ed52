"""Image bytes to a uint8 tensor, the one decoder used by the packer, the loader and inference."""

from __future__ import annotations

import warnings

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import rgb_to_grayscale

from rtl_dist.errors import DataError

# A decoded image may hold at most this many pixels: a "decompression bomb" of a few kilobytes can
# ask for gigabytes (Pillow's own limit is of the same size).
MAX_PIXELS = 178_956_970

_DEPRECATION = "The image decoding and encoding capabilities of TorchVision are deprecated"
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def decode(content: bytes, channels: int) -> torch.Tensor:
    """Decodes a JPEG, PNG or WebP file.

    Returns:
        uint8 tensor of shape (channels, height, width), EXIF orientation applied.

    Raises:
        DataError: the bytes are not a whole, decodable image.
    """
    if not content:
        raise DataError("cannot be decoded: it is empty")
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    grey_webp = channels == 1 and content[:4] == b"RIFF"  # that decoder knows only colour
    mode = ImageReadMode.RGB if grey_webp else _MODES[channels]
    try:
        with warnings.catch_warnings():  # torchvision 0.29 announces that torchcodec will follow
            warnings.filterwarnings("ignore", message=_DEPRECATION, category=DeprecationWarning)
            image = decode_image(encoded, mode=mode, apply_exif_orientation=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot be decoded: {reason}") from error
    if image.dtype == torch.uint16:  # 16-bit PNG
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return rgb_to_grayscale(image) if grey_webp else image
