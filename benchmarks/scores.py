"""What a method says of every validation image, in one file, the same of every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_scores(path: Path, stems: Sequence[str], scores: np.ndarray) -> None:
    """Writes them.

    Args:
        stems: the images' names without folder and suffix.
        scores: float32 (images, classes): probabilities, of a softmax or (multi-label) a sigmoid
            each; classes sorted by name, or (multi-label) in the order of the table's columns.
    """
    with open(path, "wb") as file:
        np.savez(file, stems=np.asarray(stems), scores=scores.astype(np.float32))


def read_scores(path: Path) -> dict[str, np.ndarray]:
    """Scores by stem."""
    with np.load(path) as held:
        return dict(zip(held["stems"].tolist(), held["scores"], strict=True))
