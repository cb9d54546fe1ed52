"""EXIF orientation: how a picture was held, and the picture upright."""

from __future__ import annotations

import struct

import torch

_ORIENTATION = 0x0112
_UPRIGHT = 1
_ENTRY = 12  # bytes of a tag's entry
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # BYTE, SHORT and LONG: some write it so


def orientation_of(exif: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1, upright, where nothing else can be read.

    exif: of any origin and maybe damaged, from its TIFF header on.
    """
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return _UPRIGHT
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (number,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + number * _ENTRY, _ENTRY):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION and kind in _INTEGERS and count == 1:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], exif, entry + 8)
                return int(value) if 1 <= value <= 8 else _UPRIGHT
    except struct.error:  # it ends before it should
        pass
    return _UPRIGHT


def upright(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """(C, h, w) pixels as they should be seen."""
    if orientation >= 5:
        image = image.transpose(-1, -2)
    mirrored = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}
    dims = mirrored.get(orientation)
    return image.flip(dims) if dims else image
