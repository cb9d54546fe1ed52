"""From what the label members say to class names and numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.text import did_you_mean, shorten
from rtl_dist.prepare.class_names import in_order, one_spelling
from rtl_dist.prepare.indexing.labels import Value

_MAX_CLASSES = 1_000_000
_NUMBER = re.compile("0|[1-9][0-9]{0,8}")


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
) -> tuple[tuple[str, ...], dict[Value, int], tuple[str, ...]]:
    """(class names, the number of each value, what is to be said of that).

    Numbers that go from 1 to as many as there are classes count from one, others from zero.

    Args:
        values: every class number or name that a label member says, and a shard where it does.
        given: the names in their order; None: numbers name themselves, names are sorted.

    Raises:
        DataError: some are numbers and some names, or a number is beyond sense.
        UserError: ``given`` does not cover them, or covers them in two ways.
    """
    if given is not None:
        numbers, first = _number_given(values, given)
        return tuple(given), numbers, _from_one() if first else ()
    numbered = [value for value in values if isinstance(value, int)]
    names = [value for value in values if isinstance(value, str)]
    if numbered and names:
        raise DataError(
            f"some labels are class numbers ({numbered[0]} in {values[numbered[0]]}), some are"
            f" names ({names[0]!r} in {values[names[0]]}): list the names in order with --classes"
        )
    if names:
        spelling = one_spelling(names)
        classes = in_order(set(spelling.values()))
        place = {name: number for number, name in enumerate(classes)}
        return classes, {name: place[spelling[name]] for name in names}, ()
    highest = max(numbered, default=-1)
    if highest >= _MAX_CLASSES:
        raise DataError(
            f"class number {highest} (in {values[highest]}) is more than the {_MAX_CLASSES:,}"
            " allowed; if these are no class numbers, choose another member with --label or"
            " --field"
        )
    first = _first(numbered)
    classes = tuple(str(number) for number in range(first, highest + 1))
    return classes, {n: n - first for n in numbered}, _from_one() if first else ()


def _first(numbers: Sequence[int]) -> int:
    """1 where all of 1 to the highest are there and 0 is not, else 0."""
    return int(len(numbers) > 1 and min(numbers) == 1 and max(numbers) == len(set(numbers)))


def _from_one() -> tuple[str, ...]:
    return ("labels count from 1 here: label 1 is the first class, whose number is 0 for us",)


def _number_given(values: dict[Value, str], given: Sequence[str]) -> tuple[dict[Value, int], int]:
    """(the number of each value, the number that the first of ``given`` has in the labels)."""
    position = {unicodedata.normalize("NFC", name): number for number, name in enumerate(given)}
    # digits in a member of text are a name if there is one of that name, else a number
    as_number = {
        value: int(value)
        for value in values
        if isinstance(value, int) or (_NUMBER.fullmatch(value) and value not in position)
    }
    numbers = sorted(as_number.values())
    # with as many names as the highest number, only counting from 1 leaves it one
    first = int(bool(numbers) and numbers[0] >= 1 and numbers[-1] == len(given))
    by_name = all(str(value) in position for value in as_number)
    by_number = not numbers or numbers[-1] < first + len(given)
    if by_name and by_number and any(position[str(n)] != n - first for n in numbers):
        raise UserError(
            f"the labels {shorten([str(value) for value in numbers])} can be class numbers"
            " or names of --classes, which differ: give names that are no numbers"
        )
    only_numbers = len(as_number) == len(values) or all(isinstance(one, int) for one in as_number)
    if only_numbers and not by_name and not by_number:
        highest = max(as_number, key=lambda value: as_number[value])
        raise UserError(
            f"--classes names {len(given)} classes, but {values[highest]} holds class number"
            f" {highest}: name all of {min(1, numbers[0])} to {highest}"
        )
    numbered: dict[Value, int] = {}
    for value, where in values.items():
        text = unicodedata.normalize("NFC", str(value))
        if text in position:
            numbered[value] = position[text]
        elif value in as_number and by_number:
            numbered[value] = as_number[value] - first
        else:
            hint = did_you_mean(text, given, "that by {!r}")
            raise UserError(f"--classes lacks {value!r}, a label in {where}{hint}; add it")
    return numbered, 0 if by_name else first


def all_values(labels: Iterable[Value | tuple[Value, ...]]) -> set[Value]:
    """The single class numbers and names in some labels."""
    found: set[Value] = set()
    for label in set(labels):
        found.update(label if isinstance(label, tuple) else (label,))
    return found
