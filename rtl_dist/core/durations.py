"""Spans of time as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_UNITS = {word: unit for unit in _SECONDS for word in (unit, f"{unit}s", unit[0])}


@dataclass(frozen=True)
class Duration:
    """``count`` (any positive number) of seconds, minutes, hours or days."""

    count: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Reads ``90 minutes``, ``11.5 hours``, ``1 day`` or, for short, ``90m``.

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
        if not match or match[2] not in _UNITS:
            raise ValueError(
                f"expected something like '30s', '90 minutes' or '11.5h', not {text!r}"
            )
        if float(match[1]) <= 0:
            raise ValueError(f"expected a positive number of {_UNITS[match[2]]}s, not {match[1]}")
        return cls(float(match[1]), _UNITS[match[2]])

    def __str__(self) -> str:
        return f"{self.count:g} {self.unit}" + ("s" if self.count != 1 else "")

    @property
    def seconds(self) -> float:
        return self.count * _SECONDS[self.unit]
