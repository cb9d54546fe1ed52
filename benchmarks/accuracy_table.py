"""The Markdown table of accuracy.py's cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

Cells = Mapping[tuple[str, str, int], dict[str, Any]]
"""The files of cells by (set, method, seed)."""

HEAD_ONLY = ("ours-head", "logreg")
COLUMNS = (
    *("set", "method", "seeds", "value", "macro F1", "95 %", "CPU-s", "/ logreg"),
    *("/ practitioner", "to his accuracy", "images", "place"),
)


def table(cells: Cells) -> str:
    """Means over the seeds, ± their standard error where there are two or more.

    Ratios are medians over the seeds that both have: of whole CPU-seconds; and, "to his accuracy",
    of those to the first evaluation that found the practitioner's best, ours over his own.
    ``place`` is of ours alone, ``ours-head`` beside the head-only methods and ``ours`` beside all
    the others: first, or within one standard error (of the difference, seed by seed) of the best
    of the others, or how far behind it.
    """
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name in dict.fromkeys(key[0] for key in cells):
        of_set = {key[1:]: cell for key, cell in cells.items() if key[0] == name}
        for part in next(iter(of_set.values()))["figures"]:
            title = name if part == "all" else f"{name}, {part}"
            methods = dict.fromkeys(method for method, _ in of_set)
            lines += [_row(title, part, of_set, method) for method in methods]
    return "\n".join(lines)


def _row(title: str, part: str, of_set: Mapping[tuple[str, int], Any], method: str) -> str:
    runs = [cell for (of, _), cell in of_set.items() if of == method]
    own = [run["figures"][part] for run in runs]
    low, high = (statistics.mean(figures["interval"][end] for figures in own) for end in (0, 1))
    cost = {
        other: _ratio([(a["cpu_s"], b["cpu_s"]) for a, b in _pairs(of_set, method, other)])
        for other in ("logreg", "practitioner")
    }
    to_his = ""
    if method == "ours":
        times = [_times_to_his(a, b) for a, b in _pairs(of_set, method, "practitioner")]
        reached = [pair for pair in times if pair is not None]
        to_his = f"{_ratio(reached)} ({len(reached)} of {len(times)})" if times else ""
    values = [figures["value"] for figures in own]
    cells = (
        *(title, method, str(len(runs)), with_error(values)),
        *(f"{statistics.mean(f['macro_f1'] for f in own):.3f}", f"{low:.3f} to {high:.3f}"),
        *(f"{statistics.mean(run['cpu_s'] for run in runs):.0f}", cost["logreg"]),
        *(cost["practitioner"], to_his),
        f"{statistics.mean(run['num_images'] for run in runs):,.0f}",
        _place(part, of_set, method),
    )
    return "| " + " | ".join(cells) + " |"


def _pairs(
    of_set: Mapping[tuple[str, int], Any], method: str, other: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Cells of two methods, of the seeds that both have."""
    return [
        (cell, of_set[other, seed])
        for (of, seed), cell in of_set.items()
        if of == method and (other, seed) in of_set
    ]


def _ratio(pairs: list[tuple[float, float]]) -> str:
    return f"{statistics.median(a / b for a, b in pairs):.2f}" if pairs else ""


def _times_to_his(ours: dict[str, Any], his: dict[str, Any]) -> tuple[float, float] | None:
    """CPU-seconds until ours and he had his best accuracy; None: ours never had it."""
    target = max(evaluation["value"] for evaluation in his["evaluations"])
    first = [
        next((e["cpu_s"] for e in cell["evaluations"] if e["value"] >= target), None)
        for cell in (ours, his)
    ]
    return None if first[0] is None else (first[0], first[1])


def with_error(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {standard_error(values):.3f}"


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _place(part: str, of_set: Mapping[tuple[str, int], Any], method: str) -> str:
    if method not in ("ours", "ours-head"):
        return ""
    gaps = {}
    for other in dict.fromkeys(of for of, _ in of_set):
        is_rival = other in HEAD_ONLY if method == "ours-head" else other != "ours-head"
        pairs = _pairs(of_set, method, other)
        if is_rival and other != method and pairs:
            gaps[other] = [
                a["figures"][part]["value"] - b["figures"][part]["value"] for a, b in pairs
            ]
    if not gaps:
        return ""
    best = min(gaps, key=lambda other: statistics.mean(gaps[other]))
    gap, error = statistics.mean(gaps[best]), standard_error(gaps[best])
    if gap >= 0:
        return "**first**"
    near = "**within 1 s.e.**" if -gap <= error else "behind"
    return f"{near}: {gap:+.3f} ± {error:.3f} of {best}"
