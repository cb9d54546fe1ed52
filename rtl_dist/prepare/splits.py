"""The splits of a data set: their names, and what must be true of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from rtl_dist.core.errors import DataError
from rtl_dist.core.text import shorten

TRAIN, VAL, TEST = "train", "val", "test"
SPLIT_ORDER = (TRAIN, VAL, TEST)
# The names under which people keep their splits, in lower case.
SPLIT_OF = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validation": VAL,
    "validate": VAL,
    "dev": VAL,
    "eval": VAL,
    "evaluation": VAL,
    "test": TEST,
    "testing": TEST,
}
# What people put beside or behind them: train_images, val2017, TestSet.
_DECORATION = {"", "set", "data", "dataset", "split", "image", "images", "img", "imgs", "photos"}


def split_named(name: str) -> str | None:
    """The split that a folder or table of this name is, however it is written; None: none.

    ``Training``, ``val2017`` and ``test_set`` are; ``test-strips`` is not.
    """
    words = re.split(r"[^a-z]+", name.lower())
    words = [w.removesuffix("set") if w.removesuffix("set") in SPLIT_OF else w for w in words]
    rest = [word for word in words if word not in _DECORATION]
    return SPLIT_OF.get(rest[0]) if len(rest) == 1 else None


def scatter_key(salt: str, name: str) -> bytes:
    """Sorting by this puts names in a fixed pseudo-random order, another for each salt.

    A hash, not a seeded generator: the order depends neither on NumPy's version nor on how many
    other names there are, nor on the order in which the file system lists them.
    """
    return hashlib.sha256(f"{salt}\0{name}".encode("utf-8", "surrogateescape")).digest()


def check_classes_in_splits(
    classes: Sequence[str],
    counts: dict[str, Counter[int]],
    after: str = "",
    *,
    leave_out: str = "leave the class out",
) -> None:
    """Every class must have a sample in every split.

    ``counts`` maps each split to its samples a class number; ``after`` is put behind the message,
    ``leave_out`` says how to do without a class that train has not.

    Raises:
        DataError: names the first such class, its split, how many more there are, and the cure.
    """
    missing = [
        (name, split)
        for split, count in counts.items()
        for i, name in enumerate(classes)
        if not count[i]
    ]
    if missing:
        name, split = missing[0]
        others = [f"{name!r} in {split}" for name, split in missing[1:]]
        also = f" (and so have {shorten(others)})" if others else ""
        in_train = any(split == TRAIN for _, split in missing)
        way_out = leave_out if in_train else "give --allow-missing-classes"
        raise DataError(
            f"class {name!r} has no image in split {split!r}{also}{after}; add images of it there,"
            f" or {way_out}"
        )
