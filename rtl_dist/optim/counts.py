"""Training counts that come out the same however they are split over time and ranks.

All sums are integers (a sample's loss in fixed point), so their order does not matter: a run that
was stopped, resumed or spread over other ranks reports the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rtl_dist.core.tasks import SINGLE_LABEL, Task

_LOSS_UNIT = 2**20  # a loss is counted in millionths, roughly
_LOSS_LIMIT = 2.0**24  # keeps sums within int64
# positions in the vector of counts
_SAMPLES, _LOSS, _NON_FINITE, _CORRECT = 0, 1, 2, 3
_TRUE_POSITIVE, _FALSE_POSITIVE, _FALSE_NEGATIVE = 3, 4, 5
_SIZE = 6


class TrainTotals:
    """Counts on the device; nothing is read back until ``flush``, so a step never waits for it.

    What is added counts once its step is accepted.
    """

    def __init__(self, *, task: Task, device: torch.device) -> None:
        self._task = task
        self._counts = torch.zeros(_SIZE, dtype=torch.int64, device=device)
        self._of_step = torch.zeros_like(self._counts)

    @torch.no_grad()
    def add(self, losses: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """losses: (n,). scores: logits (n, C). labels: int64 (n,) or 0/1 float (n, C)."""
        clean = losses.double().nan_to_num(0.0, 0.0, 0.0).clamp_(-_LOSS_LIMIT, _LOSS_LIMIT)
        counts = [
            clean.mul_(_LOSS_UNIT).round_().to(torch.int64).sum(),
            (losses - losses != 0).sum(),  # not a number is none; isfinite is four operations
        ]
        if self._task == SINGLE_LABEL:
            counts += [(scores.argmax(1) == labels).sum()]
        else:
            said, true = scores > 0, labels > 0.5
            counts += [(said & true).sum(), (said & ~true).sum(), (~said & true).sum()]
        self._of_step[_SAMPLES] += len(losses)
        self._of_step[_LOSS : _LOSS + len(counts)] += torch.stack(counts)

    def accept(self) -> None:
        self._counts += self._of_step
        self._of_step.zero_()

    def flush(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
        """The counts of all ranks since the last flush, then starts again from zero.

        Args:
            sum_over_ranks: of an int64 tensor on the host, which it may overwrite.
        """
        counts = sum_over_ranks(self._counts.cpu().clone())
        self._counts.zero_()
        return [int(n) for n in counts.tolist()]


def add_counts(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one or [0] * _SIZE, other, strict=True)]


def train_metrics(counts: list[int], *, task: Task) -> dict[str, float]:
    """``train/...`` metrics of flushed counts; empty if they hold no sample."""
    if not counts or not counts[_SAMPLES]:
        return {}
    finite = counts[_SAMPLES] - counts[_NON_FINITE]
    loss = counts[_LOSS] / _LOSS_UNIT / finite if finite else float("nan")
    if task == SINGLE_LABEL:
        share = counts[_CORRECT] / counts[_SAMPLES]
    else:  # F1
        hits = 2 * counts[_TRUE_POSITIVE]
        total = hits + counts[_FALSE_POSITIVE] + counts[_FALSE_NEGATIVE]
        share = hits / total if total else 0.0
    return {"train/loss": loss, f"train/{task.counted}": share}


def non_finite(counts: list[int]) -> int:
    """How many samples had a loss that was not a number."""
    return counts[_NON_FINITE] if counts else 0
