"""The checks of a section's values: all that fail are told together."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rtl_dist.core.text import brief


@dataclass(frozen=True)
class Failure:
    """A check that failed."""

    message: str
    """Starts with the key at fault, as a config writes it, and a colon."""
    keys: frozenset[str]
    """The keys of the section that the check looked at."""


class SectionError(ValueError):
    """What is wrong with the values of a section."""

    def __init__(self, failures: list[Failure]) -> None:
        super().__init__("; ".join(failure.message for failure in failures))
        self.failures = tuple(failures)


class Checks:
    """Collects the checks of a block that fail; leaving it raises them together.

    ::

        with Checks() as check:
            check(self.keep >= 1, "keep: must be at least 1")
    """

    def __init__(self) -> None:
        self._failures: list[Failure] = []

    def __enter__(self) -> Checks:
        return self

    def __call__(self, condition: bool, message: str, *others: str) -> None:
        """Notes ``message``, which starts with the key at fault, unless ``condition`` holds.

        others: keys that were looked at besides that one; where one of them is no value at all,
            the loader says only that.
        """
        if not condition:
            key = message.partition(":")[0].partition(".")[0]
            self._failures.append(Failure(message, frozenset((key, *others))))

    def fractions(self, section: object, *names: str) -> None:
        """That these keys of a section lie in 0 to 1."""
        for name in names:
            value = getattr(section, name)
            self(0 <= value <= 1, f"{name}: must lie in 0 to 1, not {value}")

    def at_most(self, section: object, **limits: float) -> None:
        """That these keys of a section, where they are numbers, are not above what anything can
        use: an absurd number is refused here, not where it makes something overflow."""
        for name, limit in limits.items():
            value = getattr(section, name)
            key = name.rstrip("_")
            self(
                not isinstance(value, int | float) or value <= limit,
                f"{key}: must be at most {limit:,}, not {brief(value)}",
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self._failures:
            raise SectionError(self._failures)
