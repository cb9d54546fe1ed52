"""A rectangle of a JPEG without decoding the rest, by an extension that may not be there.

Where it is missing, or a file is of a kind it does not take, the caller decodes the whole file.
The pixels are the same either way, so they do not depend on how a machine was set up.
"""

from __future__ import annotations

from functools import cache

import torch

from rtl_dist.data.images.decode import decode
from rtl_dist.data.images.foreign import MAX_PIXELS

try:
    import rtl_dist.data.images._region as _native
except ImportError:  # built only where libjpeg-turbo's headers are
    _native = None

# A 40 x 24 JPEG with subsampled colour, to compare this decoder with the other.
_PROBE = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffdb0043001b12141714111b1716171e1c1b2028422b282525"
    "28513a3d3042605565645f555d5b6a7899816a7190735b5d85b586909ea3abadab6780bcc9baa6c799a8aba4ff"
    "db0043011c1e1e2823284e2b2b4ea46e5d6ea4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4"
    "a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4ffc00011080018002803012200021101031101ffc400"
    "190001010101010100000000000000000000000304020105ffc400241000010303040203010000000000000000"
    "0100020304112105123151224113326181ffc4001801000301010000000000000000000000000002030104ffc4"
    "002111000202010402030000000000000000000102000311041213212231415181ffda000c0301000211031100"
    "3f00bb2b227b2cf68048e7a5965a164e7744e20f4395dd5d135d6309c1e8295399a95d770f1e38c229a028dca7"
    "1158f2be2a3f9291326a5713e47d5c2ecea713cec93ec7165593518a51b08b0b2ca74f8e571746475ca0debeb1"
    "dfdcdb981c56c312828a3a81b9845ed8f48a7696885c0c5d14b8ad6ec1cce840d5285539908aaa68a4db237700"
    "be945510cacb48003fb9444da8636360fa89556a6b367ccc555422425f0bbf817b07cf466ef6e07774454abbf0"
    "323a463639dddcd47508a51b25c1e911136a1b81b6a486a461fa33ffd9"
)


@cache
def available() -> bool:
    """Whether regions are decoded here: the extension is built, and its libjpeg makes the pixels
    that torchvision's makes."""
    if _native is None:
        return False
    for channels in (1, 3):
        region = decode_region(_PROBE, 5, 9, 13, 21, channels)
        whole = decode(_PROBE, channels)
        if region is None or not torch.equal(region, whole[:, 5:18, 9:30]):
            return False
    return True


def region_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a file that can be decoded by region; None: it must be decoded whole."""
    if not available():
        return None
    size = _native.header(content)
    if size is None or size[0] * size[1] > MAX_PIXELS:
        return None
    return size[1], size[0]


def decode_region(
    content: bytes, top: int, left: int, height: int, width: int, channels: int
) -> torch.Tensor | None:
    """``decode(content, channels)[:, top : top + height, left : left + width]``.

    Args:
        content: a file for which ``region_size`` gave a size.

    Returns:
        uint8 tensor of shape (channels, height, width), interleaved in memory; None: the file is
        damaged in a way that the other decoder must judge.

    Raises:
        ValueError: the region is empty or not inside the image.
    """
    pixels = torch.empty((max(height, 0), max(width, 0), channels), dtype=torch.uint8)
    if not _native.decode_region(content, top, left, height, width, channels, pixels.numpy()):
        return None
    return pixels.permute(2, 0, 1)
