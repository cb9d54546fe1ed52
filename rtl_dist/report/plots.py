"""The curves of a run over its epochs: loss, accuracy, learning rates, throughput.

Training is a solid blue line, validation a dashed vermillion one with markers; stages are parted
by labelled vertical lines. Each function takes a ``History`` and returns a figure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rtl_dist.core.tasks import METRICS
from rtl_dist.report.figure import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    INK,
    LINE_STYLES,
    ORANGE,
    PURPLE,
    VERMILLION,
    dress,
    new_figure,
    outside_legend,
    plain,
    say,
)
from rtl_dist.report.history import History, joined
from rtl_dist.report.rates import distinct_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# No curve needs more points than a screen has columns.
_MAX_POINTS = 1500
_WIDE = 20  # speeds further apart than this are drawn on a logarithmic axis


def loss_figure(history: History) -> Figure:
    """Training and validation loss."""
    figure = new_figure(9.0, 4.6)
    axes = figure.add_subplot()
    dress(axes, title="Loss", x="epoch", y="loss (nats)")
    _pair(axes, history, "loss", scale=1.0)
    _mark_stages(axes, history)
    outside_legend(axes)
    return figure


def accuracy_figure(history: History, best: tuple[float, float] | None) -> Figure:
    """The compared metric in percent, the gap shaded, ``best`` (epoch, share) marked by a star;
    multi-label runs show the headline's validation curve as well."""
    figure = new_figure(9.0, 4.6)
    axes = figure.add_subplot()
    name, extra = METRICS[history.compared].name, ""
    if history.compared != history.headline:
        extra = f" and {METRICS[history.headline].name}"
    dress(axes, title=name[0].upper() + name[1:] + extra, x="epoch", y=f"{name} (%)")
    parts = [_trained(part, history.compared) for part in history.parts]
    epochs, train = joined((x, y) for x, y, _ in parts)
    if len(epochs) > 1:
        axes.fill_between(
            epochs,
            100 * train,
            100 * joined((x, y) for x, _, y in parts)[1],
            color=ORANGE,
            alpha=0.18,
            linewidth=0,
            label="gap",
        )
    _pair(axes, history, history.compared, scale=100.0)
    if extra:
        x, y = history.series(f"val/{history.headline}")
        label = f"validation, {METRICS[history.headline].name}"
        axes.plot(x, 100 * y, color=PURPLE, linestyle="-.", linewidth=2.0, marker="s", label=label)
        axes.set_ylabel("%", fontsize=10)
    if best is not None:
        axes.plot(
            best[0],
            100 * best[1],
            linestyle="none",
            marker="*",
            markersize=15,
            color=GREEN,
            markeredgecolor="white",
            zorder=5,
            label=f"best {100 * best[1]:.2f} %\n(epoch {best[0]:.4g})",
        )
    _mark_stages(axes, history)
    outside_legend(axes)
    return figure


def learning_rate_figure(history: History, falling: Collection[str] = ()) -> Figure:
    """Each parameter group's learning rate, logarithmic: zeros (a warm-up's start) are left out.

    falling: the stages whose rate falls from one step to the next, not little by little.
    """
    import matplotlib

    figure = new_figure(9.0, 4.6)
    axes = figure.add_subplot()
    dress(axes, title="Learning rate", x="epoch", y="learning rate")
    curves = distinct_rates(history, falling)
    few = len(curves) <= len(CYCLE)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, max(len(curves), 2)))
    for place, (label, epochs, rates) in enumerate(curves):
        axes.plot(
            epochs,
            rates,
            color=CYCLE[place] if few else shades[place],
            linewidth=1.6,
            linestyle=LINE_STYLES[place % len(LINE_STYLES)],
            label=label,
            **_dots(rates),
        )
    if curves:
        axes.set_yscale("log")
        axes.grid(True, which="minor", color="#EFEFEF", linewidth=0.4)
    else:
        say(axes, _missing(history, "no learning rates were logged"))
    _mark_stages(axes, history)
    outside_legend(axes, ncols=1 + len(curves) // 20)
    return figure


def throughput_figure(history: History) -> Figure:
    """Images a second, and below it the share of time spent waiting for data."""
    figure = new_figure(9.0, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    dress(top, title="Throughput", y="images per second")
    dress(bottom, x="epoch", y="wait for data (%)")
    panels = (
        (top, "speed/images_per_second", BLUE, 1),
        (bottom, "speed/data_wait", VERMILLION, 100),
    )
    for axes, name, color, scale in panels:
        epochs, values = history.series(name)
        values = scale * values
        if not len(values):
            say(axes, _missing(history, f"{name} was not logged"))
            continue
        axes.plot(*_thin(epochs, values), color=color, linewidth=1.4, **_dots(values))
        axes.set_ylim(0, 1.12 * float(values.max()) or 1.0)
        if axes is top and values.max() > _WIDE * values.min() > 0:
            # a stage on cached features beside one on pixels: each must stay readable
            axes.set_ylim(0.5 * float(values.min()), 2 * float(values.max()))
            axes.set_yscale("log")
    _mark_stages(top, history)
    _mark_stages(bottom, history, named=False)
    return figure


def _pair(axes: Axes, history: History, metric: str, *, scale: float) -> None:
    """Train against validation: steps faint, evaluations strong. The training lines break between
    stages: a line across would show a loss that rises where none was measured."""
    parts = [part.series(f"train/{metric}", evaluations=False) for part in history.parts]
    num_rows = sum(len(x) for x, _ in parts)
    epochs, _, value = history.at_evaluations(metric)
    at, train = joined(_trained(part, metric)[:2] for part in history.parts)
    if not num_rows and not len(value):
        say(axes, f"neither train/{metric} nor val/{metric} was logged")
        return
    if num_rows:
        alone = not len(train)
        between = "training, in between" if num_rows > 1 else None
        x, y = joined(_thin(*part, most=_MAX_POINTS * len(part[0]) // num_rows) for part in parts)
        axes.plot(
            x,
            scale * y,
            color=BLUE,
            markersize=4,
            linewidth=1.6 if alone else 0.9,
            alpha=1.0 if alone else 0.35,
            label="training" if alone else between,
            **_dots(y),
        )
    if len(train):
        y = scale * train
        axes.plot(at, y, color=BLUE, linestyle="-", linewidth=2.0, label="training", **_dots(y))
    if len(value):
        axes.plot(
            epochs,
            scale * value,
            color=VERMILLION,
            linestyle="--",
            linewidth=2.0,
            marker="o" if len(value) <= 60 else None,
            markersize=4.5,
            label="validation",
        )


def _mark_stages(axes: Axes, history: History, *, named: bool = True) -> None:
    """A line where each later stage starts, and each stage's name above the axes at its start."""
    stages = history.stages
    low, high = min(0.0, stages[0].start), stages[-1].end
    high = high if high > low else low + 1  # a run without steps
    axes.set_xlim(low - 0.01 * (high - low), high + 0.02 * (high - low))
    for stage in stages[1:]:
        axes.axvline(stage.start, color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    if not named:
        return
    levels = _label_levels(
        [(s.start - low) / (high - low) for s in stages], [len(plain(s.name, 18)) for s in stages]
    )
    for stage, level in zip(stages, levels, strict=True):
        axes.annotate(
            plain(stage.name, 18),
            (stage.start, 1.0),
            xytext=(2, 4 + 12 * level),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=9,
            color=GREY,
            ha="left",
            va="bottom",
        )
    axes.set_title(
        axes.get_title(loc="left"),
        fontsize=12,
        loc="left",
        color=INK,
        fontweight="bold",
        pad=20 + 12 * max(levels),
    )


def _label_levels(starts: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """For labels that start at these shares of the axis, the lowest rows where none overlap; of
    those that would, the earlier is higher, so that they are read downwards."""
    taken_from: list[float] = []  # by row
    levels = []
    for start, length in zip(reversed(starts), reversed(lengths), strict=True):
        end = start + 0.014 * (length + 1)
        level = next((i for i, first in enumerate(taken_from) if end <= first), len(taken_from))
        taken_from[level : level + 1] = [start]
        levels.append(level)
    return levels[::-1]


def _missing(history: History, why: str) -> str:
    """``why`` a panel is empty, or that a solved head was all there was."""
    return why if history.rows[-1]["step"] else "no steps were taken"


def _trained(part: History, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, training and validation values of the evaluations that have both."""
    epochs, train, value = part.at_evaluations(metric)
    both = np.isfinite(train)
    return epochs[both], train[both], value[both]


def _thin(
    x: np.ndarray, y: np.ndarray, *, most: int = _MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """At most that many points, at least one: the means of equal runs of neighbours."""
    if len(x) <= most:
        return x, y
    cuts = np.linspace(0, len(x), max(1, most) + 1).astype(int)[:-1]
    sizes = np.diff(np.append(cuts, len(x)))
    return np.add.reduceat(x, cuts) / sizes, np.add.reduceat(y, cuts) / sizes


def _dots(values: np.ndarray) -> dict[str, Any]:
    """Markers where a line alone would be invisible or would hide how few points there are: on
    each piece between two NaNs that has at most 3."""
    piece = np.cumsum(np.isnan(values))
    sizes = np.bincount(piece[~np.isnan(values)], minlength=len(values) + 1)
    few = ~np.isnan(values) & (sizes[piece] <= 3)
    return {"marker": ".", "markevery": few.tolist()} if few.any() else {}
