"""Which images of one split are near copies of an image of another, by difference hashes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 12
MOST_BITS = 4


def difference_hash(content: bytes) -> np.ndarray:
    """bool (144,): where an image shrunk to 13 x 12 grey pixels gets lighter from left to right."""
    grey = Image.open(io.BytesIO(content)).convert("L")
    pixels = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS))
    return (pixels[:, 1:] > pixels[:, :-1]).ravel()


def near_copies(of: Sequence[bytes], among: Sequence[bytes]) -> list[bool]:
    """For each image of ``of`` whether one of ``among`` differs in at most 4 of 144 bits."""
    others = np.stack([difference_hash(content) for content in among])
    return [
        bool(((others != difference_hash(content)).sum(axis=1) <= MOST_BITS).any())
        for content in of
    ]
