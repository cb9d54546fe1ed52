"""Steps that are not taken because their gradient is not finite, counted without waiting.

Whether a step was taken is known on the device, and equally on all ranks, whose gradients are the
same. On a GPU the host reads the count of the step before, which the GPU has done with by the time
it is asked, so the two never wait for each other.
"""

from __future__ import annotations

import torch


class SkippedSteps:
    """Counts from ``total`` and ``in_a_row`` on."""

    def __init__(self, device: torch.device, *, total: int, in_a_row: int) -> None:
        self._counts = torch.tensor([total, in_a_row], device=device)
        self._if_taken = torch.tensor([1, 0], device=device)
        self._lags = device.type == "cuda"
        self._known = [torch.tensor([total, in_a_row]) for _ in range(2)]
        if self._lags:
            self._known = [counts.pin_memory() for counts in self._known]
            self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def note(self, taken: torch.Tensor) -> None:
        """taken: a bool on the device."""
        self._counts = torch.where(taken, self._counts * self._if_taken, self._counts + 1)
        self._turn ^= 1
        self._known[self._turn].copy_(self._counts, non_blocking=self._lags)
        if self._lags:
            self._copied[self._turn].record()

    @property
    def in_a_row(self) -> int:
        """How many steps up to the last one (on a GPU: the last but one) were skipped."""
        turn = self._turn ^ 1 if self._lags else self._turn
        if self._lags:
            self._copied[turn].synchronize()
        return int(self._known[turn][1])

    def exact(self) -> tuple[int, int]:
        """(of all steps, in a row up to the last one); waits for the device."""
        total, in_a_row = self._counts.tolist()
        return total, in_a_row
