"""Predictions as rows of text: a CSV's, lines of JSON, or for whoever reads a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rtl_dist.core.csv_cells import csv_text
from rtl_dist.core.tasks import MULTI_LABEL, Task
from rtl_dist.core.text import shown
from rtl_dist.inference.prediction import DIGITS, Prediction
from rtl_dist.model.calibration import Calibration

Kind = Literal["text", "number", "flag", "texts", "numbers"]
JOINED_BY = "|"  # several labels in a cell, as evaluate's tables have them
_WIDEST_NAME = 60


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table of predictions."""

    name: str
    """In the header."""
    kind: Kind
    """Of its values; any may be None."""
    value: Callable[[Prediction], Any]
    """Of a prediction."""


def columns_of(task: Task, calibration: Calibration, *, top: int) -> tuple[Column, ...]:
    """The columns that a model's predictions have, whatever they are.

    Args:
        top: how many classes are told with their probabilities.
    """
    columns = [Column(name="input", kind="text", value=lambda p: p.source)]
    if task == MULTI_LABEL:
        columns += [
            Column(name="labels", kind="texts", value=_labels),
            Column(name="probabilities", kind="numbers", value=_probabilities),
        ]
        columns += [one for place in range(top) for one in _ranked(place, f"_{place + 1}")]
    else:
        columns += [
            one for place in range(top) for one in _ranked(place, f"_{place + 1}" if place else "")
        ]
        if calibration.abstain_below is not None:
            columns.append(Column(name="abstained", kind="flag", value=_abstained))
    if calibration.set_quantile is not None:
        columns.append(Column(name="set", kind="texts", value=lambda p: p.set))
    return (*columns, Column(name="error", kind="text", value=lambda p: p.error))


def csv_header(columns: Sequence[Column]) -> str:
    return csv_text([column.name for column in columns], [])


def csv_rows(columns: Sequence[Column], predictions: Sequence[Prediction]) -> str:
    """Their rows, each with its end of line."""
    first, *others = ([_cell(c.kind, c.value(p)) for c in columns] for p in predictions)
    return csv_text(first, others)


def json_lines(predictions: Sequence[Prediction], *, top: int) -> str:
    """An object a line; see ``Prediction.to_dict``."""
    return "".join(
        f"{json.dumps(prediction.to_dict(top), ensure_ascii=False)}\n" for prediction in predictions
    )


def value_lines(columns: Sequence[Column], predictions: Sequence[Prediction]) -> str:
    """Values as they are, a list of JSON a row, to be made a table of another kind later."""
    return "".join(f"{json.dumps([c.value(p) for c in columns])}\n" for p in predictions)


def readable_lines(predictions: Sequence[Prediction], *, top: int) -> str:
    """For reading; names that are no longer than usual are padded to the same width."""
    names = [shown(prediction.source) for prediction in predictions]
    width = min(_WIDEST_NAME, max(map(len, names)))
    return "".join(
        f"{name:<{width}}  {_readable(prediction, top)}\n"
        for name, prediction in zip(names, predictions, strict=True)
    )


def _readable(prediction: Prediction, top: int) -> str:
    if prediction.error is not None:
        return f"not predicted: it {shown(prediction.error)}"
    told = ", ".join(f"{shown(label)} {value:.4f}" for label, value in prediction.top(top))
    if prediction.task == MULTI_LABEL:
        labels = ", ".join(
            f"{shown(label)} {prediction.of(label):.4f}" for label in prediction.labels
        )
        return (labels or "no label") + (f"  (most probable: {told})" if told else "")
    among = f"; one of {', '.join(map(shown, prediction.set))}" if prediction.set else ""
    return f"{'not sure: ' if prediction.abstained else ''}{told}{among}"


def _cell(kind: Kind, value: Any) -> Any:
    if value is None:
        return None
    if kind == "number":
        return f"{value:.{DIGITS}f}"
    if kind == "numbers":
        return JOINED_BY.join(f"{one:.{DIGITS}f}" for one in value)
    if kind == "texts":
        return JOINED_BY.join(value)
    return str(value).lower() if kind == "flag" else value


def _ranked(place: int, suffix: str) -> tuple[Column, Column]:
    """The class at a place of the order by probability, from 0."""

    def ranked(prediction: Prediction) -> tuple[str | None, float | None]:
        return prediction.top(place + 1)[place] if prediction.error is None else (None, None)

    return (
        Column(name=f"label{suffix}", kind="text", value=lambda p: ranked(p)[0]),
        Column(name=f"probability{suffix}", kind="number", value=lambda p: ranked(p)[1]),
    )


def _labels(prediction: Prediction) -> tuple[str, ...] | None:
    return prediction.labels if prediction.error is None else None


def _probabilities(prediction: Prediction) -> list[float | None] | None:
    if prediction.error is not None:
        return None
    return [prediction.of(label) for label in prediction.labels]


def _abstained(prediction: Prediction) -> bool | None:
    return prediction.abstained if prediction.error is None else None
