"""Image bytes to a uint8 tensor, the one decoder used by the packer, the loader and inference."""

from __future__ import annotations

import re
import struct
import warnings

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import rgb_to_grayscale

from rtl_dist.core.errors import DataError, WorkerError
from rtl_dist.data.images.foreign import MAX_PIXELS
from rtl_dist.data.images.png_check import SIGNATURE

_DEPRECATION = "The image decoding and encoding capabilities of TorchVision are deprecated"
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def decode(content: bytes, channels: int) -> torch.Tensor:
    """Decodes a JPEG, PNG or WebP file.

    Returns:
        uint8 tensor of shape (channels, height, width), EXIF orientation applied.

    Raises:
        DataError: the bytes are not a whole, decodable image.
        WorkerError: out of memory.
    """
    if not content:
        raise DataError("cannot be decoded: it is empty")
    if claimed_pixels(content) > MAX_PIXELS:
        raise DataError(f"has more than the {MAX_PIXELS:,} pixels allowed")
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    grey_webp = channels == 1 and content[:4] == b"RIFF"  # that decoder knows only colour
    mode = ImageReadMode.RGB if grey_webp else _MODES[channels]
    try:
        with warnings.catch_warnings():  # torchvision 0.29 announces that torchcodec will follow
            warnings.filterwarnings("ignore", message=_DEPRECATION, category=DeprecationWarning)
            image = decode_image(encoded, mode=mode, apply_exif_orientation=True)
    except (RuntimeError, ValueError) as error:
        if "allocate memory" in str(error):  # not the image's fault: no other may stand for it
            raise WorkerError(
                "no memory was left to decode an image; lower data.workers or batch.micro"
            ) from error
        # torchvision puts its own source files into its messages
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0])
        raise DataError(f"cannot be decoded: {reason}") from error
    if image.dtype == torch.uint16:  # 16-bit PNG
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return rgb_to_grayscale(image) if grey_webp else image


def claimed_pixels(content: bytes) -> int:
    """Width times height as a JPEG's or PNG's header gives them; 0 where there is none that a
    decoder would believe. A WebP cannot claim more than 2^28, which its decoder bounds itself."""
    if content.startswith(SIGNATURE):
        width, height = struct.unpack(">II", content[16:24].ljust(8, b"\0"))
        return int(width * height)
    if not content.startswith(b"\xff\xd8"):
        return 0
    at = 2
    while at + 9 <= len(content):
        if content[at] != 0xFF:
            return 0
        marker = content[at + 1]
        if marker == 0xFF:  # padding before a marker
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack(">HH", content[at + 5 : at + 9])
            return int(width * height)
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers that stand alone
            at += 2
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return 0
