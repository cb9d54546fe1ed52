"""When things happen: learning rate, stage boundaries and recurring events, as functions of
the step.

Everything here is pure, so the whole plan of a run is known before it starts and a resumed run
needs nothing but its step. "Step" always means optimizer step, counted from 0 over the whole run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_UNITS = {"epoch": "epoch", "epochs": "epoch", "step": "step", "steps": "step"}


@dataclass(frozen=True)
class Every:
    """A recurring event: every ``count`` epochs (any positive number) or whole steps."""

    count: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> Every:
        """Reads ``1 epoch``, ``0.5 epochs`` or ``200 steps``.

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
        if not match or match[2] not in _UNITS:
            raise ValueError(f"expected something like '1 epoch' or '200 steps', not {text!r}")
        count, unit = Fraction(match[1]), _UNITS[match[2]]
        if count <= 0 or (unit == "step" and count.denominator != 1):
            raise ValueError(f"expected a positive number of {unit}s, not {match[1]}")
        return cls(count, unit)

    def __str__(self) -> str:
        number = Decimal(self.count.numerator) / self.count.denominator
        return f"{number:f} {self.unit}" + ("s" if self.count != 1 else "")

    def events_by(self, step: int, *, global_batch_size: int, num_samples: int) -> int:
        """How often the event has come due once ``step`` steps are done."""
        if self.unit == "step":
            return step // int(self.count)
        return int(Fraction(step * global_batch_size, num_samples) / self.count)


def is_due(step: int, every: Every, *, last: int, global_batch_size: int, num_samples: int) -> bool:
    """Whether the event came due in the steps after ``last`` up to and including ``step``."""
    size = {"global_batch_size": global_batch_size, "num_samples": num_samples}
    return every.events_by(step, **size) > every.events_by(last, **size)


@dataclass(frozen=True)
class StageSpan:
    """The steps ``[first_step, end_step)`` of one stage."""

    first_step: int
    end_step: int

    @property
    def num_steps(self) -> int:
        return self.end_step - self.first_step


def stage_spans(
    epochs: list[float | None], steps: list[int | None], *, num_samples: int, global_batch_size: int
) -> list[StageSpan]:
    """Lays the stages end to end over one stream of samples.

    A stage measured in epochs ends at the first step by which its samples have all been seen: the
    tail of an epoch shares a batch with the head of the next, so nothing is dropped or padded.

    Args:
        epochs: per stage, its length in epochs, or None where ``steps`` says.
        steps: per stage, its length in steps, or None where ``epochs`` says.
    """
    spans, first, samples = [], 0, Fraction(0)
    for stage_epochs, stage_steps in zip(epochs, steps, strict=True):
        if stage_epochs is not None:
            samples += Fraction(str(stage_epochs)) * num_samples
            end = max(first + 1, math.ceil(samples / global_batch_size))
        else:
            assert stage_steps is not None
            end = first + stage_steps
            samples = Fraction(end * global_batch_size)
        spans.append(StageSpan(first, end))
        first = end
    return spans


def learning_rate_factor(step: int, *, num_steps: int, warmup: float, shape: str) -> float:
    """What a stage's base learning rates are multiplied by at its ``step``-th step (from 0).

    Args:
        step: in ``[0, num_steps)``.
        warmup: below 1 a fraction of the stage, from 1 a number of steps; linear from near 0.
        shape: ``cosine`` (to 0, Loshchilov & Hutter 2017, arXiv 1608.03983), ``linear`` or
            ``constant``.
    """
    warmup_steps = min(math.ceil(warmup * num_steps) if warmup < 1 else int(warmup), num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1 - progress
    return 1.0
