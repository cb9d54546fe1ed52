"""A val split held out of train, the same share of every class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.core.text import shorten
from rtl_dist.prepare.splits import scatter_key


def check_val_fraction(fraction: float) -> None:
    """Raises UserError: it is no part of train, or all of it."""
    if not 0 <= fraction < 1:
        raise UserError(f"--val-fraction is {fraction}: give 0 or more, less than 1")


def check_large_enough(classes: Sequence[str], counts: Sequence[Counter[int]]) -> None:
    """Raises DataError: a class has one sample, so that train or val would have none of it.

    Args:
        counts: samples by class number, of each split.
    """
    totals = sum(counts, Counter[int]())
    small = [name for number, name in enumerate(classes) if totals[number] == 1]
    if small:
        raise DataError(
            f"--val-fraction needs two images of a class, one for each side, but there is one only"
            f" of {shorten([repr(name) for name in small])}: add images of it, leave the class out,"
            " or give --allow-missing-classes, which trains on it and measures nothing of it"
        )


def held_out(train: Mapping[str, tuple[int, ...]], task: str, fraction: float) -> set[str]:
    """The names of train that become val: of each class, or of each set of labels.

    Chosen by names and labels alone, so it is the same wherever the images lie.

    Args:
        train: class numbers by name.
    """
    names = sorted(train, key=lambda name: scatter_key("val", name))
    choose = _of_each_class if task == SINGLE_LABEL else _of_label_sets
    return choose([(name, train[name]) for name in names], fraction)


def _of_each_class(train: list[tuple[str, tuple[int, ...]]], fraction: float) -> set[str]:
    """Of each class the nearest whole number, at least one but never all."""
    by_class = defaultdict(list)
    for name, labels in train:
        by_class[labels].append(name)
    return {
        name
        for names in by_class.values()
        for name in names[: min(max(1, round(len(names) * fraction)), len(names) - 1)]
    }


def _of_label_sets(train: list[tuple[str, tuple[int, ...]]], fraction: float) -> set[str]:
    """Every so-many-th of the items sorted by label set, the rarest sets together.

    Label sets are many and mostly small: rounding within each would take none of the small ones.
    """
    frequency = Counter(labels for _, labels in train)
    ordered = sorted(train, key=lambda item: (-frequency[item[1]], item[1]))
    return {
        name for i, (name, _) in enumerate(ordered) if int((i + 1) * fraction) > int(i * fraction)
    }
