"""How long and how often, as people write it: spans of time, and events every so many steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from rtl_dist.core.text import brief

_UNITS = {"epoch": "epoch", "epochs": "epoch", "step": "step", "steps": "step"}

_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,12})?"
_LONGEST_DAYS = 1000  # timers end at 292 years

_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_DURATION_UNITS = {word: unit for unit in _SECONDS for word in (unit, f"{unit}s", unit[0])}


def _as_slurm_writes(text: str) -> int | None:
    """The seconds of ``minutes:seconds``, ``hours:minutes:seconds`` or ``days-hours`` with or
    without more behind it (sbatch, ``--time``); None of anything else."""
    if match := re.fullmatch(
        r"([0-9]{1,5})-([0-9]{1,5})(?::([0-9]{1,5}))?(?::([0-9]{1,5}))?", text
    ):
        days, hours, minutes, seconds = (int(each or 0) for each in match.groups())
    elif match := re.fullmatch(r"(?:([0-9]{1,7}):)?([0-9]{1,7}):([0-9]{1,5})", text):
        days, (hours, minutes, seconds) = 0, (int(each or 0) for each in match.groups())
    else:
        return None
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class Duration:
    """A span of time, in the unit it was written in."""

    count: float
    """How many of the unit: any positive number."""
    unit: str
    """``second``, ``minute``, ``hour`` or ``day``."""

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Reads ``90 minutes``, ``11.5 hours``, ``1 day`` or, for short, ``90m``; and SLURM's ways
        with a colon or a dash: ``30:00`` (minutes), ``11:30:00``, ``1-12``, ``1-12:30`` and
        ``1-12:30:00`` (days).

        Raises:
            ValueError: anything else, or longer than ``_LONGEST_DAYS``.
        """
        match = re.fullmatch(rf"\s*({_NUMBER})\s*([A-Za-z]+)\s*", text)
        unit = _DURATION_UNITS.get(match[2].lower()) if match else None
        if match and unit:
            span = cls(float(match[1]), unit)
        elif (seconds := _as_slurm_writes(text.strip())) is not None:
            span = cls(float(seconds), "second")
        else:
            raise ValueError(
                "expected something like '30s', '90 minutes', '11.5h' or '1-12:30:00', not"
                f" {brief(text)}"
            )
        if span.seconds <= 0:
            raise ValueError(f"expected a positive number of {span.unit}s, not {span.count:g}")
        if span.seconds > _LONGEST_DAYS * _SECONDS["day"]:
            raise ValueError(f"must be at most {_LONGEST_DAYS:,} days, not {brief(text.strip())}")
        return span

    def __str__(self) -> str:
        return f"{Decimal(repr(self.count)).normalize():f} {self.unit}" + (
            "s" if self.count != 1 else ""
        )

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
        match = re.fullmatch(rf"\s*({_NUMBER})\s*([a-z]+)\s*", text)
        if not match or match[2] not in _UNITS:
            raise ValueError(f"expected something like '1 epoch' or '200 steps', not {brief(text)}")
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
