"""What an image file's header says, read as its decoder will read it."""

from __future__ import annotations

from typing import NamedTuple


class Header(NamedTuple):
    """Of a JPEG, PNG or WebP that a decoder may be given."""

    width: int
    """Pixels, before ``exif`` turns it."""
    height: int
    """The same, downwards."""
    is_grey: bool
    """Whether the file holds no colour."""
    depth: int
    """Bits of a sample of a pixel."""
    exif: bytes
    """Its Exif data, a TIFF header first; empty if there is none."""
