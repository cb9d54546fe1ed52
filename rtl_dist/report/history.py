"""What a run's ``metrics.jsonl`` says: its rows as series over epochs, and its stages.

The file may still be written to, and an interrupted run may have done some steps twice; both are
handled here, so that plots and tables need not know.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import Task

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """One stage as it went. Figures are shares, 0 to 1; None where they were not logged."""

    name: str
    """As its config calls it."""
    start: float
    """In epochs of the run."""
    end: float
    """In epochs of the run."""
    steps: int
    """Optimizer steps, as far as it has come."""
    seconds: float
    """Wall time, over all starts of the run."""
    best: float | None
    """Highest headline metric on the validation split."""
    best_epoch: float | None
    """The epoch of the run in which that was reached."""
    final: float | None
    """The headline metric at the last evaluation."""
    final_loss: float | None
    """Validation loss at the last evaluation, in nats."""
    train: float | None
    """The compared metric on what was trained on before the last evaluation."""
    gap: float | None
    """That minus the same of the validation split."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run has logged."""

    rows: tuple[dict[str, Any], ...]
    """In the order of steps; each has at least a finite ``step`` and ``epoch``."""
    unreadable: tuple[int, ...]
    """Numbers, from 1, of the damaged lines."""

    @property
    def headline(self) -> str:
        """The validation metric by which the run is judged: its task's headline."""
        return self._first([task.headline for task in Task], "val/")

    @property
    def compared(self) -> str:
        """The metric that training and validation share: what training counts, where it does not
        keep the scores that a mean average precision needs."""
        return self._first([self.headline, *(task.counted for task in Task)], "train/")

    def _first(self, names: list[str], prefix: str) -> str:
        logged = set().union(*self.rows)
        return next((name for name in names if prefix + name in logged), names[0])

    def names(self, prefix: str) -> list[str]:
        """Keys with that prefix, in order of appearance."""
        found = {key: None for row in self.rows for key in row if key.startswith(prefix)}
        return list(found)

    def series(self, name: str, *, evaluations: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and values, float64 (n,), of the rows in which ``name`` is a finite number;
        without ``evaluations`` only of rows that hold no validation."""
        points = [
            (row["epoch"], row[name])
            for row in self.rows
            if is_finite(row.get(name)) and (evaluations or "val/loss" not in row)
        ]
        array = np.array(points, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def at_evaluations(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epochs, training and validation values, float64 (n,), of the rows with ``val/<metric>``.

        The training value is the row's own, which covers all samples since the evaluation before;
        without it, validation plus ``gap/``, else the mean of the rows in between; NaN if none.
        """
        points: list[tuple[float, float, float]] = []
        since: list[float] = []
        for row in self.rows:
            if is_finite(row.get(f"train/{metric}")):
                since.append(row[f"train/{metric}"])
            if not is_finite(row.get(f"val/{metric}")):
                continue
            value = row[f"val/{metric}"]
            if is_finite(row.get(f"train/{metric}")):
                train = row[f"train/{metric}"]
            elif is_finite(row.get(f"gap/{metric}")):
                train = value + row[f"gap/{metric}"]
            else:
                train = float(np.mean(since)) if since else math.nan
            points.append((row["epoch"], train, value))
            since = []
        array = np.array(points, dtype=np.float64).reshape(-1, 3)
        return array[:, 0], array[:, 1], array[:, 2]

    @property
    def parts(self) -> list[History]:
        """What each stage logged, in the order in which they ran."""
        groups = itertools.groupby(self.rows, key=lambda row: row.get("stage"))
        return [History(rows=tuple(rows), unreadable=()) for _, rows in groups]

    @property
    def stages(self) -> list[StageSpan]:
        """The stages in the order in which they ran."""
        spans, end, step, elapsed = [], 0.0, 0, 0.0
        for part in self.parts:
            rows = part.rows
            start, first_step, seconds = end, step, 0.0
            end, step = rows[-1]["epoch"], int(rows[-1]["step"])
            for row in rows:
                # A clock that starts again at a resume counts from there.
                now = row["elapsed_s"] if is_finite(row.get("elapsed_s")) else elapsed
                seconds += now - elapsed if now >= elapsed else now
                elapsed = now
            _, train, value = part.at_evaluations(self.compared)
            values = part.series(f"val/{self.headline}")
            best = part._highest(self.headline)
            spans.append(
                StageSpan(
                    name=str(rows[0].get("stage", "training")),
                    start=start,
                    end=end,
                    steps=step - first_step,
                    seconds=seconds,
                    best=None if best is None else best[1],
                    best_epoch=None if best is None else best[0],
                    final=_last(values[1]),
                    final_loss=_last(part.series("val/loss")[1]),
                    train=_last(train),
                    gap=_last(train - value),
                )
            )
        return spans

    def best(self) -> tuple[float, float] | None:
        """Epoch and value of the highest headline metric on the validation split; of equal ones
        that with the lowest loss, and then the first, as training chooses its best weights."""
        return self._highest(self.headline)

    def _highest(self, metric: str) -> tuple[float, float] | None:
        name = f"val/{metric}"
        rows = [row for row in self.rows if is_finite(row.get(name))]
        if not rows:
            return None
        top = max(rows, key=lambda row: (row[name], -_loss(row)))
        return float(top["epoch"]), float(top[name])


def read_history(run: Path) -> History:
    """Reads ``metrics.jsonl`` of a run folder.

    A half-written last line is ignored. Where a resumed run did steps again, the later rows count;
    rows of one step are one row.

    Raises:
        UserError: the file is missing, cannot be read, or has no whole row yet.
    """
    path = run / METRICS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: {run} is not a run folder, or its training has not logged a step"
            " yet; give the folder that run.dir named"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a run folder") from error
    rows: list[dict[str, Any]] = []
    unreadable = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            if line.strip() and number < len(lines):
                unreadable.append(number)
            continue
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        if rows and (rows[-1]["step"], rows[-1].get("stage")) == (row["step"], row.get("stage")):
            row = rows.pop() | row
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no whole row yet; wait until training has logged a step")
    return History(rows=tuple(rows), unreadable=tuple(unreadable))


def joined(pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One curve of several, with a NaN between each two, so that no line joins their values."""
    some = [piece for piece in pieces if len(piece[0])]
    if not some:
        return np.empty(0), np.empty(0)
    epochs, values = (np.concatenate(arrays) for arrays in zip(*some, strict=True))
    places = np.cumsum([len(piece[0]) for piece in some])[:-1]
    return np.insert(epochs, places, epochs[places]), np.insert(values, places, np.nan)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if isinstance(row, dict) and is_finite(row.get("step")) and is_finite(row.get("epoch")):
        return row
    return None


def is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def _loss(row: dict[str, Any]) -> float:
    return float(row["val/loss"]) if is_finite(row.get("val/loss")) else math.inf


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None
