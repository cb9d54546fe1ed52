"""Tensors laid side by side in one buffer, so that arithmetic on all is one operation on it.

A network has hundreds of small tensors, and a GPU takes longer to be asked for an operation than
to do a small one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class SideBySide:
    """Room for the values of tensors of one dtype on one device.

    Attributes:
        flat: (N,), all values in a row.
        parts: views of it, each laid out in memory as its tensor is.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """
        Args:
            tensors: at least one; what they hold is not copied.
        """
        self.flat = tensors[0].new_empty(sum(one.numel() for one in tensors))
        self.parts = []
        offset = 0
        for one in tensors:
            like = one if _is_dense(one) else one.contiguous()
            self.parts.append(self.flat.as_strided(like.shape, like.stride(), offset))
            offset += one.numel()

    def take(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copies their values in; returns ``flat``."""
        torch._foreach_copy_(self.parts, list(tensors))
        return self.flat

    def give(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copies its values into them."""
        torch._foreach_copy_(list(tensors), self.parts)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Its values fill the memory from its first to its last without a gap or an overlap."""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)
