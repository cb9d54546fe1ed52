"""What an exported model is to whoever checks, times or uses it, whatever runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch


class Runner(Protocol):
    """An exported model that is loaded."""

    def of_image(self, image: torch.Tensor) -> np.ndarray:
        """uint8 (C, H, W) of any size to float32 (K,) probabilities."""

    def of_views(self, views: torch.Tensor) -> np.ndarray:
        """uint8 (N, C, S, S) to float32 (N, K)."""

    def layers(self, image: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
        """What each layer makes of uint8 (C, H, W), in order: first ``view``, uint8
        (1, S, S, C), then the modules of ``BatchGraph`` by name. Slow: for finding a fault."""
