"""From what the label members say to class names and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.text import did_you_mean, shorten
from rtl_dist.prepare.indexing.labels import Value

_MAX_CLASSES = 1_000_000


def read_classes(text: str) -> tuple[str, ...]:
    """``--classes``: names with commas between them, or a file with one a line.

    Raises:
        UserError: there is no such file, or a name is empty, unprintable or there twice.
    """
    if "," in text:
        names = [name.strip() for name in text.split(",")]
    else:
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(
                f"--classes {text}: {reason}; give a file of one name a line, or A,B,C"
            ) from error
        names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if not name or not name.isprintable():
            raise UserError(f"--classes {text}: {name!r} is no class name")
    twice = [name for name in dict.fromkeys(names) if len(names) > len(set(names))]
    twice = [name for name in twice if names.count(name) > 1]
    if twice:
        raise UserError(f"--classes {text} names {shorten(twice)} twice; name each class once")
    if not names:
        raise UserError(f"--classes {text} names nothing")
    return tuple(names)


def number_classes(
    values: dict[Value, str], given: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[Value, int]]:
    """(class names, the number of each value).

    Args:
        values: every class number or name that a label member says, and a shard where it does.
        given: the names in their order; None: numbers name themselves, names are sorted.

    Raises:
        DataError: some are numbers and some names, or a number is beyond sense.
        UserError: ``given`` does not cover them, or covers them in two ways.
    """
    if given is not None:
        return tuple(given), _number_given(values, given)
    numbers = [value for value in values if isinstance(value, int)]
    names = [value for value in values if isinstance(value, str)]
    if numbers and names:
        raise DataError(
            f"some labels are class numbers ({numbers[0]} in {values[numbers[0]]}), some are names"
            f" ({names[0]!r} in {values[names[0]]}): list the names in order with --classes"
        )
    if names:
        classes = tuple(sorted(names))
        return classes, {name: number for number, name in enumerate(classes)}
    highest = max(numbers, default=-1)
    if highest >= _MAX_CLASSES:
        raise DataError(
            f"class number {highest} (in {values[highest]}) is more than the {_MAX_CLASSES:,}"
            " allowed; if these are no class numbers, choose another member with --label or"
            " --field"
        )
    classes = tuple(str(number) for number in range(highest + 1))
    return classes, {number: number for number in numbers}


def _number_given(values: dict[Value, str], given: Sequence[str]) -> dict[Value, int]:
    position = {name: number for number, name in enumerate(given)}
    numbers = [value for value in values if isinstance(value, int)]
    by_name = all(str(value) in position for value in numbers)
    by_number = all(value < len(given) for value in numbers)
    if by_name and by_number and any(position[str(value)] != value for value in numbers):
        raise UserError(
            f"the labels {shorten([str(value) for value in sorted(numbers)])} can be class numbers"
            " or names of --classes, which differ: give names that are no numbers"
        )
    if numbers and not by_name and not by_number:
        highest = max(numbers)
        raise UserError(
            f"--classes names {len(given)} classes, but {values[highest]} holds class number"
            f" {highest}: name all of 0 to {highest}"
        )
    numbered: dict[Value, int] = {}
    for value, where in values.items():
        if isinstance(value, int):
            numbered[value] = position[str(value)] if by_name else value
        elif value in position:
            numbered[value] = position[value]
        else:
            hint = did_you_mean(value, given, "that by {!r}")
            raise UserError(f"--classes lacks {value!r}, a label in {where}{hint}; add it")
    return numbered


def all_values(labels: Iterable[Value | tuple[Value, ...]]) -> set[Value]:
    """The single class numbers and names in some labels."""
    found: set[Value] = set()
    for label in set(labels):
        found.update(label if isinstance(label, tuple) else (label,))
    return found
