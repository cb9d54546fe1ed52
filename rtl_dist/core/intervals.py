"""How long and how often, as people write it: spans of time, and events every so many steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_UNITS = {"epoch": "epoch", "epochs": "epoch", "step": "step", "steps": "step"}

_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_DURATION_UNITS = {word: unit for unit in _SECONDS for word in (unit, f"{unit}s", unit[0])}


@dataclass(frozen=True)
class Duration:
    """A span of time, in the unit it was written in."""

    count: float
    """How many of the unit: any positive number."""
    unit: str
    """``second``, ``minute``, ``hour`` or ``day``."""

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Reads ``90 minutes``, ``11.5 hours``, ``1 day`` or, for short, ``90m``.

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
        if not match or match[2] not in _DURATION_UNITS:
            raise ValueError(
                f"expected something like '30s', '90 minutes' or '11.5h', not {text!r}"
            )
        if float(match[1]) <= 0:
            raise ValueError(
                f"expected a positive number of {_DURATION_UNITS[match[2]]}s, not {match[1]}"
            )
        return cls(float(match[1]), _DURATION_UNITS[match[2]])

    def __str__(self) -> str:
        return f"{self.count:g} {self.unit}" + ("s" if self.count != 1 else "")

    @property
    def seconds(self) -> float:
        return self.count * _SECONDS[self.unit]


@dataclass(frozen=True)
class Every:
    """A recurring event."""

    count: Fraction
    """How many of the unit lie between two: any positive number of epochs, or whole steps."""
    unit: str
    """``epoch`` or ``step``."""

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
