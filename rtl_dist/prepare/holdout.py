"""A val split held out of train, the same share of every class."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.prepare.sources.items import Item, Source
from rtl_dist.prepare.splits import TRAIN, VAL, scatter_key


def with_val(source: Source, fraction: float) -> list[Item]:
    """The items with a part of train made val: of each class, or of each set of labels."""
    if VAL in source.splits:
        raise UserError(
            "--val-fraction was given, but the source already has a val split: leave the option"
            " out, or move the source's val images into train"
        )
    train = [item for item in source.items if item.split == TRAIN]
    if not train:
        raise UserError("--val-fraction was given, but the source has no train split to take from")
    train.sort(key=lambda item: scatter_key("val", item.name))
    chosen = (_val_single_label if source.task == SINGLE_LABEL else _val_multi_label)(
        train, fraction
    )
    return [
        replace(item, split=VAL) if item.split == TRAIN and item.name in chosen else item
        for item in source.items
    ]


def _val_single_label(train: list[Item], fraction: float) -> set[str]:
    """Of each class the nearest whole number, at least one but never all."""
    by_class = defaultdict(list)
    for item in train:
        by_class[item.labels].append(item.name)
    return {
        name
        for names in by_class.values()
        for name in names[: min(max(1, round(len(names) * fraction)), len(names) - 1)]
    }


def _val_multi_label(train: list[Item], fraction: float) -> set[str]:
    """Every so-many-th of the items sorted by label set, the rarest sets together.

    Label sets are many and mostly small: rounding within each would take none of the small ones.
    """
    frequency = Counter(item.labels for item in train)
    ordered = sorted(train, key=lambda item: (-frequency[item.labels], item.labels))
    return {
        item.name for i, item in enumerate(ordered) if int((i + 1) * fraction) > int(i * fraction)
    }
