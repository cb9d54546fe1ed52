"""Grids of cases too large for every day: a share always runs, ``pytest -m exhaustive`` the rest."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def one_of_each(
    cases: Iterable[Any],
    kind: Callable[[Any], Hashable] = lambda case: None,
    name: Callable[[Any], str] = str,
) -> list[ParameterSet]:
    """The cases as parameters, by name; one of each kind always runs.

    Which one only its name decides, so that cases that come or go change nothing for other kinds.

    Args:
        cases: each the value of one parameter, or a tuple of several.
    """
    cases = list(cases)
    chosen: dict[Hashable, str] = {}
    for case in cases:
        known = chosen.setdefault(kind(case), name(case))
        chosen[kind(case)] = min(known, name(case), key=lambda one: zlib.crc32(one.encode()))
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name(case),
            marks=() if name(case) == chosen[kind(case)] else pytest.mark.exhaustive,
        )
        for case in cases
    ]
