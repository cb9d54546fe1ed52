"""The names of classes: one spelling each, and the order in which they are numbered."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from rtl_dist.core.text import and_more

_MOST_SHOWN = 12
_NUMBER = re.compile("[0-9]+")


def one_spelling(names: Iterable[str]) -> dict[str, str]:
    """Each name to the one that stands for it: é may be written as one character or as two (NFC
    and NFD, as different systems do), and is the same letter. Where a name is written in one way
    only, that is kept."""
    ways: dict[str, list[str]] = {}
    for name in names:
        ways.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return {
        name: alike[0] if len(alike) == 1 else composed
        for composed, alike in ways.items()
        for name in alike
    }


def are_numbers(names: Iterable[str]) -> bool:
    return all(_NUMBER.fullmatch(name) for name in names)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted: by value if all are numbers (2 before 10), else as text."""
    names = sorted(names)
    # zeros before a number say no more; to compare lengths first needs no limit on digits
    by_value = [(len(name.lstrip("0")), name.lstrip("0"), name) for name in names]
    return tuple(name for *_, name in sorted(by_value)) if are_numbers(names) else tuple(names)


def class_line(classes: Sequence[str], counts: Mapping[str, Sequence[int]]) -> str:
    """``classes: ants 20, bees 18``: samples of each class over all splits, of many the first."""
    totals = [sum(of_class) for of_class in zip(*counts.values(), strict=True)]
    each = [f"{name} {total:,}" for name, total in zip(classes, totals, strict=True)]
    line = f"classes: {', '.join(each[:_MOST_SHOWN])}{and_more(len(each) - _MOST_SHOWN)}"
    if len(each) > _MOST_SHOWN:
        least, most = totals.index(min(totals)), totals.index(max(totals))
        line += f"; the smallest is {each[least]}, the largest {each[most]}"
    return line
