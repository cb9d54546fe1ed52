"""The figures of one evaluation: confusion, precision against recall, calibration.

Each function takes arrays and returns a figure; nothing here touches a file. All stay readable
from 2 classes to tens of thousands: with many, the figure shows the whole and names only the worst.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rtl_dist.core.tasks import MULTI_LABEL, Task
from rtl_dist.evaluation.confusion import Confusion
from rtl_dist.evaluation.metrics import ClassScores, positives
from rtl_dist.evaluation.predictions import Predictions
from rtl_dist.evaluation.reliability import Reliability
from rtl_dist.report.figure import (
    BLUE,
    CYCLE,
    GREY,
    INK,
    LINE_STYLES,
    ORANGE,
    VERMILLION,
    dress,
    new_figure,
    outside_legend,
    plain,
    say,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Up to this many classes a confusion matrix shows its counts, respectively its class names.
COUNTS_SHOWN = 20
NAMES_SHOWN = 60
# Up to this many classes each has its own precision-recall curve.
CURVES_SHOWN = 12
# Why there is no average precision: it needs every score of a class at once.
TOO_MANY_SCORES = "left out: samples x classes are too many scores to keep"

# More classes than this are drawn in blocks, else their cells would be smaller than a pixel.
_CELLS_SHOWN = 250
_WORST = 5


def confusion_figure(confusion: Confusion, classes: Sequence[str]) -> Figure:
    """A single-label confusion matrix, coloured by row share."""
    num_classes = len(classes)
    side = max(4.2, 1.8 + 0.52 * num_classes)
    if num_classes > COUNTS_SHOWN:
        side = min(12.0, 4.0 + 0.14 * num_classes)
    figure = new_figure(side + 1.0, side)
    axes = figure.add_subplot()
    # With many classes the square root lifts rare confusions out of the background.
    shown = confusion.shares if num_classes <= COUNTS_SHOWN else np.sqrt(confusion.shares)
    block = math.ceil(num_classes / _CELLS_SHOWN)
    bounds = (-0.5, math.ceil(num_classes / block) * block - 0.5)
    image = axes.imshow(
        _largest_in_blocks(confusion, shown, block),
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest",
        extent=(*bounds, *bounds[::-1]),
    )
    dress(axes, title="Confusion matrix", x="predicted", y="truth")
    axes.grid(False)
    if num_classes <= NAMES_SHOWN:
        names = [plain(name, 20) for name in classes]
        size = 9 if num_classes <= COUNTS_SHOWN else 7
        flat = 0.085 * max(map(len, names)) < (side - 2.0) / num_classes
        axes.set_xticks(range(num_classes), names, fontsize=size, rotation=0 if flat else 90)
        axes.set_yticks(range(num_classes), names, fontsize=size)
    else:
        remark = f", the largest share in each {block} x {block} classes" if block > 1 else ""
        axes.set_xlabel(f"predicted (class number{remark})", fontsize=10)
        axes.set_ylabel("truth (class number)", fontsize=10)
    if num_classes <= COUNTS_SHOWN:
        most = confusion.counts.max()
        size = 10 if most < 1000 else 8 if most < 100_000 else 6
        shares = _largest_in_blocks(confusion, confusion.shares, 1)
        for (row, column), count in np.ndenumerate(confusion.matrix()):
            color = "white" if shares[row, column] > 0.55 else INK if count else GREY
            axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    linear = num_classes <= COUNTS_SHOWN
    ticks = np.array([0, 0.25, 0.5, 0.75, 1] if linear else [0, 0.01, 0.05, 0.2, 0.5, 1])
    places = ticks if linear else np.sqrt(ticks)
    bar.set_ticks(places.tolist(), labels=[f"{100 * tick:g} %" for tick in ticks])
    bar.ax.tick_params(labelsize=9)
    return figure


def outcome_figure(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Multi-label decisions by class, int64 (C, 2, 2): right, missed and false; worst F1 first."""
    hits, false, missed = counts[:, 1, 1], counts[:, 0, 1], counts[:, 1, 0]
    f1 = 2 * hits / np.maximum(2 * hits + false + missed, 1)
    order = np.argsort(f1, kind="stable")[:40]
    figure = new_figure(9.0, max(3.0, 1.4 + 0.3 * len(order)))
    axes = figure.add_subplot()
    rows = np.arange(len(order))
    axes.barh(rows, hits[order], color=BLUE, label="found")
    axes.barh(
        rows,
        missed[order],
        left=hits[order],
        color=ORANGE,
        hatch="///",
        edgecolor="white",
        label="missed",
    )
    axes.barh(
        rows, -false[order], color=VERMILLION, hatch="...", edgecolor="white", label="false alarm"
    )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(rows, [f"{plain(classes[c], 24)}  (F1 {f1[c]:.2f})" for c in order])
    title = "Decisions by class, worst first"
    if len(order) < len(classes):
        title += f" ({len(order)} of {len(classes)} classes)"
    dress(axes, title=title, x="samples (false alarms to the left)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    outside_legend(axes)
    return figure


def precision_recall_figure(predictions: Predictions, table: Sequence[ClassScores]) -> Figure:
    """Curves of each class, or with many classes their mean and the worst by average precision."""
    areas = {
        i: row.average_precision for i, row in enumerate(table) if row.average_precision is not None
    }
    figure = new_figure(8.6, 5.2)
    axes = figure.add_subplot()
    dress(axes, title="Precision and recall", x="recall", y="precision")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(0.0, 1.02)
    if not areas:
        has_scores = predictions.scores is not None
        why = "no class has positive samples" if has_scores else TOO_MANY_SCORES
        say(axes, why)
        return figure
    ranked = sorted(areas, key=lambda i: areas[i])
    shown = sorted(areas) if len(areas) <= CURVES_SHOWN else ranked[:_WORST]
    if len(areas) > CURVES_SHOWN:
        grid = np.linspace(0.0, 1.0, 101)
        mean = np.mean([_precision_at(grid, *_curve(predictions, i)) for i in areas], axis=0)
        area = float(np.mean(list(areas.values())))
        axes.plot(
            grid, mean, color=INK, linewidth=2.4, label=f"mean of {len(areas)} classes: {area:.3f}"
        )
    for place, number in enumerate(shown):
        precision, recall = _curve(predictions, number)
        label = f"{plain(predictions.classes[number], 22)}: {areas[number]:.3f}"
        axes.step(
            recall,
            precision,
            where="post",
            color=CYCLE[place % len(CYCLE)],
            linewidth=1.5,
            linestyle=LINE_STYLES[(place // len(CYCLE) + place) % len(LINE_STYLES)],
            label=label,
        )
    heading = "average precision" + ("" if len(shown) == len(areas) else ", with the worst")
    outside_legend(axes, title=heading, title_fontsize=9, alignment="left")
    return figure


def calibration_figure(
    result: Reliability, task: Task, *, before: Reliability | None = None
) -> Figure:
    """A reliability diagram above the histogram of confidences.

    before: the same before calibration.
    """
    multi = task == MULTI_LABEL
    figure = new_figure(7.8, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    remark = "" if before is None else f" ({before.ece:.3f} before)"
    dress(
        top,
        title=f"Calibration: expected error {result.ece:.3f}{remark}",
        y="share present" if multi else "accuracy",
    )
    width = np.diff(result.edges)
    centre = result.edges[:-1] + width / 2
    some = result.counts > 0
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="perfect")
    top.bar(centre[some], result.accuracy[some], width[some] * 0.92, color=BLUE, label="observed")
    top.plot(
        result.confidence[some],
        result.accuracy[some],
        color=VERMILLION,
        marker="o",
        markersize=4,
        linewidth=1.2,
        label="at mean confidence",
    )
    if before is not None:
        told = before.counts > 0
        top.plot(
            before.confidence[told],
            before.accuracy[told],
            color=GREY,
            marker="s",
            markersize=4,
            linewidth=1.2,
            linestyle=":",
            label="before calibration",
        )
        shares = np.append(before.counts, before.counts[-1]) / before.counts.sum()
        bottom.step(before.edges, shares, where="post", color=INK, linewidth=1, linestyle=":")
    top.set_xlim(0, 1)
    top.set_ylim(0, 1.02)
    outside_legend(top)
    bottom.bar(centre, result.counts / result.counts.sum(), width * 0.92, color=GREY)
    dress(
        bottom,
        x="probability of each class" if multi else "confidence of the prediction",
        y="share",
    )
    return figure


def _largest_in_blocks(confusion: Confusion, values: np.ndarray, block: int) -> np.ndarray:
    """The largest of the cells' values in each ``block`` x ``block`` cells, so that no single one
    is lost."""
    size = math.ceil(confusion.num_classes / block)
    largest = np.zeros((size, size))
    np.maximum.at(largest, (confusion.truth // block, confusion.predicted // block), values)
    return largest


def _curve(predictions: Predictions, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of one class, from recall 1 down to 0 (scikit-learn's order)."""
    from sklearn.metrics import precision_recall_curve

    assert predictions.scores is not None
    truth = positives(predictions, number)
    precision, recall, _ = precision_recall_curve(
        truth, predictions.scores[:, number], drop_intermediate=True
    )
    precision[-1] = precision[-2]  # else an agreed 1 at recall 0, which nothing was measured at
    return precision, recall


def _precision_at(grid: np.ndarray, precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Interpolated precision at each recall of ``grid``: the best at that recall or more."""
    best = np.maximum.accumulate(precision)
    # ``recall`` falls; the last entry with recall >= r is the nearest point at or above r.
    place = np.searchsorted(-recall, -grid, side="right") - 1
    return best[place]
