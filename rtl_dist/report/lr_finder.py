"""The picture of a learning-rate range test: the loss at each rate, and up to where it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtl_dist.core.files import read_object
from rtl_dist.report.figure import (
    BLUE,
    GREEN,
    GREEN_TEXT,
    SKY,
    VERMILLION,
    draw,
    dress,
    new_figure,
    outside_legend,
    plain,
    say,
)
from rtl_dist.report.history import is_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What was measured, and what was made of it."""

    stage: str
    """The stage's name, which can name files."""
    holds_up_to: float | None
    """The largest rate at which the smoothed loss is near its lowest; None: there is none."""
    rates: list[float]
    """The learning rate of each step."""
    losses: list[float]
    """The training loss before each step, in nats."""


def read_range_test(path: Path) -> RangeTest | None:
    """What ``lr_finder/<stage>.json`` says; None when it is missing or damaged."""
    try:
        content = read_object(path)
        points = list(zip(content["rates"], content["losses"], strict=True))
        up_to = content["holds_up_to"]
    except (ValueError, KeyError, TypeError):
        return None
    if not all(is_finite(rate) and rate > 0 and is_finite(loss) for rate, loss in points):
        return None
    return RangeTest(
        stage=path.stem,
        holds_up_to=up_to if is_finite(up_to) and up_to > 0 else None,
        rates=[rate for rate, _ in points],
        losses=[loss for _, loss in points],
    )


def draw_range_test(test: RangeTest, run: Path) -> Path:
    """Draws ``plots/lr_finder_<stage>.png`` into a run folder, if it can be; returns its path."""
    path = run / "plots" / f"lr_finder_{test.stage}.png"
    draw(path, lambda: range_test_figure(test))
    return path


def range_test_figure(test: RangeTest) -> Figure:
    """Loss against rate, raw and smoothed, with the largest rate near the lowest."""
    figure = new_figure(9.0, 4.6)
    axes = figure.add_subplot()
    title = f"Learning-rate range test of {plain(test.stage)}"
    dress(axes, title=title, x="learning rate", y="training loss (nats)")
    if not test.losses:
        say(axes, "the loss was a number at no rate")
        return figure
    from rtl_dist.records.lr_finder import smoothed

    values = smoothed(test.losses)
    axes.set_xscale("log")
    axes.plot(
        test.rates,
        test.losses,
        color=SKY,
        linewidth=0.9,
        marker=".",
        markersize=4,
        alpha=0.7,
        label="loss of each step",
    )
    axes.plot(test.rates, values, color=BLUE, linewidth=2.0, label="smoothed")
    low, high = min(test.losses), max(values)  # what single steps lost beyond that is cut off
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    if (up_to := test.holds_up_to) is not None:
        near = min(range(len(values)), key=lambda i: abs(math.log(test.rates[i] / up_to)))
        axes.plot(
            test.rates[near],
            values[near],
            linestyle="none",
            marker="o",
            markersize=8,
            color=VERMILLION,
            zorder=4,
            label="largest rate within 5 %\nof the lowest",
        )
        axes.axvline(up_to, color=GREEN, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{up_to:.2g}",
            (up_to, 1.0),
            xytext=(5, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=11,
            fontweight="bold",
            color=GREEN_TEXT,
            ha="left",
            va="top",
        )
    outside_legend(axes)
    return figure
