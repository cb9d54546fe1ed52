"""Image bytes to a uint8 tensor, the one decoder used by the packer, the loader and inference."""

from __future__ import annotations

import re
import warnings
from typing import NamedTuple

import torch
from torchvision.io import ImageReadMode, decode_jpeg, decode_png, decode_webp
from torchvision.transforms.v2.functional import rgb_to_grayscale

from rtl_dist.core.errors import DataError, WorkerError
from rtl_dist.data.images.foreign import suffix_of
from rtl_dist.data.images.header import Header
from rtl_dist.data.images.jpeg import jpeg_header
from rtl_dist.data.images.libjpeg_words import heard
from rtl_dist.data.images.orientation import orientation_of, upright
from rtl_dist.data.images.png import plain_png, png_parts
from rtl_dist.data.images.webp import webp_header

_DEPRECATION = "The image decoding and encoding capabilities of TorchVision are deprecated"
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


class Decoded(NamedTuple):
    """A picture and its file."""

    pixels: torch.Tensor
    """uint8 (channels, height, width), EXIF orientation applied."""
    suffix: str
    """``jpg``, ``png`` or ``webp``: what the file is, whatever its name says."""
    header: Header
    """What it says of itself."""
    warning: str
    """What its decoder warned of; empty if of nothing."""


def decode(content: bytes, channels: int) -> torch.Tensor:
    """Decodes a JPEG, PNG or WebP file, of any origin, whatever it says of itself.

    Returns:
        uint8 tensor of shape (channels, height, width), EXIF orientation applied.

    Raises:
        DataError: the bytes are not a whole, decodable image, or ask for too much.
        WorkerError: out of memory.
    """
    return decode_file(content, channels).pixels


def decode_file(content: bytes, channels: int) -> Decoded:
    """As ``decode``, with what is known of the file."""
    suffix = suffix_of(content[:16])
    decoder = {"jpg": _decode_jpeg, "png": _decode_png, "webp": _decode_webp}[suffix]
    try:
        with warnings.catch_warnings():  # torchvision 0.29 announces that torchcodec will follow
            warnings.filterwarnings("ignore", message=_DEPRECATION, category=DeprecationWarning)
            image, header, warning = decoder(content, channels)
    except (RuntimeError, ValueError, MemoryError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(
            error
        ):  # not the image's fault: no other may stand for it
            raise WorkerError(
                "no memory was left to decode an image; lower data.workers or batch.micro"
            ) from error
        # torchvision puts its own source files into its messages
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).splitlines()[0])
        raise DataError(f"cannot be decoded: {reason}") from error
    return Decoded(upright(image, orientation_of(header.exif)), suffix, header, warning)


def _decode_jpeg(content: bytes, channels: int) -> tuple[torch.Tensor, Header, str]:
    header = jpeg_header(content)
    with heard() as words:
        image = decode_jpeg(_tensor(bytearray(content)), mode=_MODES[channels])
    return image, header, words.text


def _decode_png(content: bytes, channels: int) -> tuple[torch.Tensor, Header, str]:
    parts = png_parts(content)
    image = decode_png(_tensor(plain_png(parts, channels)), mode=_MODES[channels])
    if image.dtype == torch.uint16:  # grey, made from colour of 16 bits
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image, parts.header, ""


def _decode_webp(content: bytes, channels: int) -> tuple[torch.Tensor, Header, str]:
    header = webp_header(content)
    image = decode_webp(_tensor(bytearray(content)), mode=ImageReadMode.RGB)
    if channels == 1:  # which that decoder does not know
        image = rgb_to_grayscale(image)
    return image, header, ""


def _tensor(content: bytearray) -> torch.Tensor:
    return torch.frombuffer(content, dtype=torch.uint8)
