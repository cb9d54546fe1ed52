"""What ``train`` asks of a data set's classes: ``pack``, ``index`` and ``verify`` say it too."""

from __future__ import annotations

from collections.abc import Sequence

from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.core.text import and_more, shown


def why_untrainable(task: str, classes: Sequence[str], split: str, counts: Sequence[int]) -> str:
    """Why nothing can be trained on a split; empty where it can.

    Args:
        counts: the split's samples of each class.
    """
    if task == SINGLE_LABEL and len(classes) < 2:
        return f"there is one class only, {shown(classes[0])!r}, and nothing to tell it from"
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing:
        return (
            f"split {split!r} has no image of class {shown(missing[0])!r}"
            f"{and_more(len(missing) - 1)}"
        )
    return ""
