"""A run and an evaluation as Python sees them: their files, read."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from rtl_dist.config import Config, read_run_config
from rtl_dist.core.errors import UserError
from rtl_dist.core.text import did_you_mean
from rtl_dist.inference.model import Model
from rtl_dist.records.results import read_results
from rtl_dist.records.state import Best
from rtl_dist.report.history import is_finite, read_history
from rtl_dist.report.run import REPORT, draw_run
from rtl_dist.report.summary import read_summary

if TYPE_CHECKING:
    from rtl_dist.inference.predictor import Flips


@dataclass(frozen=True)
class Picture:
    """A PNG file; a notebook shows it."""

    path: Path
    """Where it is."""

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


class Metrics(Mapping[str, np.ndarray]):
    """A run's metrics as columns of equal length, a value a row of ``metrics.jsonl``, in the order
    of the steps: ``metrics["val/top1"]``. Figures are float64 (n,), not a number in rows that have
    none; texts, such as ``stage``, are arrays of str. ``pandas.DataFrame(dict(metrics))`` takes it.
    """

    def __init__(self, rows: tuple[dict[str, Any], ...]) -> None:
        """rows: of ``History``."""
        self._rows = rows
        self._names = list(dict.fromkeys(name for row in rows for name in row))

    def __getitem__(self, name: str) -> np.ndarray:
        """A column. Raises KeyError: there is no such; says which are like it."""
        if name not in self._names:
            raise KeyError(f"no metric {name!r}{did_you_mean(name, self._names)}")
        values = [row.get(name) for row in self._rows]
        if any(isinstance(value, str) for value in values):
            return np.array(["" if value is None else str(value) for value in values])
        return np.array([v if is_finite(v) else np.nan for v in values], dtype=np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def points(self, name: str, *, over: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
        """What to plot: values of ``over`` and ``name``, float64 (n,), of the rows with both."""
        places, values = self[over], self[name]
        some = np.isfinite(places) & np.isfinite(values)
        return places[some], values[some]

    def __repr__(self) -> str:
        return f"Metrics({len(self._rows):,} rows: {', '.join(self._names)})"


class Run:
    """A run folder, of a run that has ended or still goes on: each look reads its files."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            UserError: it is no run folder.
        """
        self.folder = Path(folder)
        if not (self.folder / "config.yaml").is_file():
            raise UserError(f"{folder} is no run folder (it has no config.yaml); give run.dir")

    @property
    def config(self) -> Config:
        """As it was resolved: nothing in it is ``auto`` any more that changes a result."""
        return read_run_config(self.folder)

    @property
    def results(self) -> Mapping[str, Any]:
        """What ``results.json`` says; empty while the run goes on."""
        return MappingProxyType(read_results(self.folder))

    @property
    def status(self) -> str:
        """``done``, ``stopped`` or ``failed``; ``running`` where it has not ended."""
        return str(self.results.get("status", "running"))

    @property
    def metrics(self) -> Metrics:
        """All that was logged. Raises UserError: nothing was, yet."""
        return Metrics(read_history(self.folder).rows)

    @property
    def best(self) -> Best | None:
        """The best evaluation: its value and where it was; None: there was none yet."""
        found = self.results.get("best")
        return None if found is None else Best(**found)

    @property
    def test(self) -> Mapping[str, float] | None:
        """The best weights' figures on the test split; None: there is no such split, or the run has
        not come to it."""
        found = self.results.get("test")
        return None if found is None else MappingProxyType(found)

    @property
    def plots(self) -> Mapping[str, Picture]:
        """The pictures in ``plots/`` by their names without ``.png``: ``loss``, ``accuracy``,
        ``learning_rate``, ``throughput``."""
        paths = sorted((self.folder / "plots").glob("*.png"))
        return MappingProxyType({path.stem: Picture(path) for path in paths})

    @property
    def report(self) -> Path:
        """The page, ``report.html``; drawn now where the run has not drawn it yet.

        Raises:
            UserError: nothing was logged yet.
        """
        page = self.folder / REPORT
        return page if page.is_file() else draw_run(self.folder)

    def evaluation(self, split: str) -> Evaluation:
        """An evaluation of the run on a split. Raises UserError: there is none."""
        return Evaluation(self.folder / "evaluation" / split)

    def load(self, *, raw: bool = False, tta: Flips | None = None) -> Model:
        """Its best weights, ready. Args and raises as ``Model``."""
        return Model(self.folder, raw=raw, tta=tta)

    def __repr__(self) -> str:
        reached = f", best {self.best.metric} {self.best.value:.4f}" if self.best else ""
        return f"Run({str(self.folder)!r}: {self.status}{reached})"


class Evaluation:
    """An evaluation's folder, as ``rtl-dist evaluate`` writes it."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            UserError: it is none.
        """
        self.folder = Path(folder)
        found = read_summary(self.folder)
        if found is None:
            raise UserError(f"{folder} is no evaluation (it has no metrics.json)")
        self.metrics: Mapping[str, Any] = MappingProxyType(found)

    @property
    def predictions(self) -> list[dict[str, str]]:
        """The rows of ``predictions.csv``, one a sample, in index order."""
        return self._rows("predictions.csv")

    @property
    def per_class(self) -> list[dict[str, str]]:
        """The rows of ``per_class.csv``, one a class."""
        return self._rows("per_class.csv")

    @property
    def plots(self) -> Mapping[str, Picture]:
        """The pictures by their names without ``.png``: ``confusion_matrix``, ``mistakes``, ..."""
        paths = sorted(self.folder.glob("*.png"))
        return MappingProxyType({path.stem: Picture(path) for path in paths})

    @property
    def report(self) -> Path:
        """The page, ``report.html``."""
        return self.folder / "report.html"

    def _rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def __repr__(self) -> str:
        shown = [f"{name} {v:.4f}" for name, v in self.metrics.items() if isinstance(v, float)]
        return f"Evaluation({str(self.folder)!r}: {', '.join(shown)})"
