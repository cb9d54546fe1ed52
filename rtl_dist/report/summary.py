"""The figures of an evaluation as ``metrics.json`` has them, and as pages show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtl_dist.core.files import read_object
from rtl_dist.core.tasks import METRICS, Metric
from rtl_dist.evaluation.calibrated import RAW
from rtl_dist.evaluation.metrics import TOP_K, wilson_interval
from rtl_dist.evaluation.predictions import Predictions
from rtl_dist.report.html import percent

_NO_METRICS = ("num_samples", "num_classes")


def summary_of(
    predictions: Predictions, metrics: dict[str, float], num_right: int
) -> dict[str, Any]:
    """The content of ``metrics.json``: the metrics, the 95 % intervals of the share of samples that
    are right and of the coverage of conformal sets, ``calibration`` (how the scores were read, as
    the model's folder has it; None: as they are), ``num_samples`` and ``num_classes``."""
    total, calibration = predictions.num_samples, predictions.calibration
    shares = {predictions.task.share_right: num_right}
    if "set_coverage" in metrics:
        shares["set_coverage"] = round(metrics["set_coverage"] * total)
    return {
        **{name: float(value) for name, value in metrics.items()},
        **{
            f"{name}_interval": [float(bound) for bound in wilson_interval(hits, total)]
            for name, hits in shares.items()
        },
        "calibration": calibration.to_dict() | {"told": calibration.told()}
        if calibration.was_fitted
        else None,
        "num_samples": total,
        "num_classes": len(predictions.classes),
    }


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The ``metrics.json`` of an evaluation folder; None when it is missing or damaged."""
    return read_object(folder / "metrics.json") or None


def headline(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The cards (value, name, remark) of a ``metrics.json``'s content, the known metrics first;
    what was before calibration is a remark."""
    cards = []
    names = [n for n in METRICS if n in summary]
    names += [n for n in summary if n not in METRICS and n not in _NO_METRICS]
    if summary.get("num_classes", TOP_K + 1) <= TOP_K:
        names = [name for name in names if name != "top5"]  # all samples are within it
    for name in names:
        value, metric = summary[name], METRICS.get(name) or Metric(name=name.replace("_", " "))
        if not _is_number(value) or name.endswith(RAW):
            continue
        remark = ""
        if f"{name}_interval" in summary:
            low, high = summary[f"{name}_interval"]
            remark = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
        stated = _calibration(summary).get("coverage")
        if name == "set_coverage" and isinstance(stated, float):
            remark = f"stated {100 * stated:g} %; {remark}"
        if f"{name}{RAW}" in summary:
            before = f"{_shown(summary[f'{name}{RAW}'], metric)} before calibration"
            remark = f"{remark}; {before}" if remark else before
        cards.append((_shown(value, metric), metric.name, remark))
    return cards


def words_of_calibration(summary: dict[str, Any], split: str) -> list[str]:
    """What a page says of how the scores were read: what was promised, and what came of it."""
    found = _calibration(summary)
    if not found:
        return ["Probabilities are the model's own: not calibrated."]
    told = [f"Calibrated: {found.get('told')}."]
    if found.get("split") == split:
        told.append(
            "A split of this name: where it is this one, the figures of the calibration are"
            " flattered."
        )
    return told


def _calibration(summary: dict[str, Any]) -> dict[str, Any]:
    found = summary.get("calibration")
    return found if isinstance(found, dict) else {}


def _shown(value: float, metric: Metric) -> str:
    return percent(value) if metric.is_share else f"{value:.4f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
