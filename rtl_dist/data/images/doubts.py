"""Pictures that can be decoded, but perhaps not to what they show."""

from __future__ import annotations

from rtl_dist.data.images.decode import Decoded

_FEW_LEVELS = 16  # of 256
_DARK_16_BIT = 64


def doubt_of(image: Decoded) -> str:
    """What speaks against its pixels, to be put behind the file's name; empty if nothing does."""
    if image.warning:
        return f"may have lost a part of its picture: its decoder says {image.warning!r}"
    low, high = (int(value) for value in image.pixels.aminmax())
    if image.header.depth == 16 and 0 < high < _DARK_16_BIT:
        bits = 8 + high.bit_length()
        return (
            f"comes out nearly black: its 16-bit values use {bits} bits at most, and the upper 8 of"
            f" 16 are taken; multiply them by {1 << 16 - bits} where it was made"
        )
    if high - low < _FEW_LEVELS:
        return f"comes out (nearly) in one colour: all its values are {low} to {high} of 255"
    return ""
