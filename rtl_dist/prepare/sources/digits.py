"""scikit-learn's digits: 1,797 greyscale images of 8x8 in the package itself, no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rtl_dist.prepare.sources.items import Item, Source, single_label_source
from rtl_dist.prepare.splits import TEST, TRAIN, VAL, scatter_key

_TRAIN_PART, _VAL_PART = 0.70, 0.15  # the rest is test


def read_digits(labels: Sequence[str] | None) -> Source:
    """Each class's images are dealt 70 : 15 : 15 to train, val and test, always the same ones.

    scikit-learn stores intensities 0 to 16; they are scaled to 0 to 255.

    Raises:
        UserError: ``labels`` names no digit.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this source needs it

    bunch = load_digits()
    pixels = np.round(np.minimum(bunch.images, 16) * (255 / 16)).astype(np.uint8)
    named = []
    for digit in range(10):
        names = {f"digits/{i:04d}": pixels[i] for i in np.flatnonzero(bunch.target == digit)}
        for place, name in enumerate(sorted(names, key=lambda name: scatter_key("digits", name))):
            part = (place + 0.5) / len(names)
            late = VAL if part < _TRAIN_PART + _VAL_PART else TEST
            split = TRAIN if part < _TRAIN_PART else late
            named.append((Item(name, split, (), names[name]), str(digit)))
    return single_label_source(Path(), named, labels)
