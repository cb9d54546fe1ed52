"""The learning rates of a run as curves: what is logged is the rate of the step before each row."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from rtl_dist.config import read_run_config
from rtl_dist.core.errors import UserError
from rtl_dist.core.text import and_more
from rtl_dist.report.figure import plain
from rtl_dist.report.history import History, joined


def falling_stages(run: Path) -> set[str]:
    """The names of a run's stages whose rate falls from one step to the next; none where there is
    no config to tell."""
    try:
        config = read_run_config(run)
    except UserError:
        return set()
    return {
        stage.name
        for stage in config.stages
        if (stage.schedule or (stage.optim or config.optim).schedule) in ("step", "plateau")
    }


def distinct_rates(
    history: History, falling: Collection[str]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Label, epochs and rates of each parameter group, NaN between stages; groups with equal rates
    share a curve.

    falling: the stages in which a rate that is lower than in the row before fell there: rows come
        just before a fall.
    """
    found: dict[bytes, tuple[list[str], np.ndarray, np.ndarray]] = {}
    for name in history.names("lr/"):
        epochs, rates = joined(_rates(part, name, falling) for part in history.parts)
        if len(rates):
            key = epochs.tobytes() + rates.tobytes()
            found.setdefault(key, ([], epochs, rates))[0].append(name.removeprefix("lr/"))
    return [
        (plain(names[0], 24) + and_more(len(names) - 1), epochs, rates)
        for names, epochs, rates in found.values()
    ]


def _rates(part: History, name: str, falling: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and rates of a stage, each fall drawn downwards at the row before it."""
    epochs, rates = part.series(name)
    epochs, rates = epochs[rates > 0], rates[rates > 0]
    if part.rows[0].get("stage") not in falling:
        return epochs, rates
    places = 1 + np.flatnonzero(rates[1:] < rates[:-1])
    return np.insert(epochs, places, epochs[places - 1]), np.insert(rates, places, rates[places])
