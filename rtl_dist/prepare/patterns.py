"""Names written in braces, as shells and webdataset have them: ``train-{000..099}.tar``."""

from __future__ import annotations

import re
from itertools import islice
from math import prod
from pathlib import Path

from rtl_dist.core.errors import UserError

_MOST = 1_000_000


def without_braces(pattern: str, *, what: str) -> list[str]:
    """The names that a pattern means; itself, where it has no braces or is there as it is.

    Args:
        what: they are names of, such as ``shards``.

    Raises:
        UserError: a brace has no partner, or the names are too many.
    """
    if "{" not in pattern or Path(pattern).exists():  # a name may hold braces
        return [pattern]
    from braceexpand import braceexpand

    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    most = prod(abs(int(first) - int(last)) + 1 for first, last in ranges)
    if most <= _MOST:  # looked at beforehand, since a range is expanded as a whole
        try:
            names = list(islice(braceexpand(pattern, escape=False), _MOST + 1))
        except ValueError as error:
            raise UserError(f"{pattern}: a brace has no partner") from error
    if most > _MOST or len(names) > _MOST:
        raise UserError(f"{pattern} names more than {_MOST:,} {what}: correct the pattern")
    return names
