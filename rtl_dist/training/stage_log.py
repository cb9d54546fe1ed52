"""The rows of a stage in ``metrics.jsonl``: where it stands, how it does, how fast it is."""

from __future__ import annotations

import time
from typing import Any

from rtl_dist.config import ResolvedStage
from rtl_dist.core.tasks import Task
from rtl_dist.core.text import duration
from rtl_dist.optim.counts import train_metrics
from rtl_dist.training.run import Run


class StageLog:
    """Writes rows; ``opened_at``: ``time.perf_counter()`` when work on the stage began."""

    def __init__(self, stage: ResolvedStage, run: Run, *, opened_at: float) -> None:
        self._stage, self._run = stage, run
        self._elapsed_before_s, self._opened_at = run.state.elapsed_s, opened_at
        self._first_step, self._began_at = run.state.step, time.perf_counter()
        self.restart_window()

    def elapsed_s(self) -> float:
        """Of the whole run, earlier starts included."""
        return self._elapsed_before_s + time.perf_counter() - self._opened_at

    def training_row(self) -> dict[str, Any]:
        """Of the steps since the last row of any kind."""
        return self._place() | train_metrics(self._run.state.since_log, task=self._run.dataset.task)

    def evaluation_row(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Of an evaluation, beside training since the last one; gaps are train less val."""
        row = self._place() | train_metrics(self._run.state.since_eval, task=self._run.dataset.task)
        row |= {f"val/{name}": value for name, value in metrics.items()}
        name = self._run.dataset.task.counted
        if f"train/{name}" in row:
            row[f"gap/{name}"] = row[f"train/{name}"] - metrics[name]
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row, with the names of damaged samples met since the last one."""
        state = self._run.state
        if new := state.bad_names[state.bad_logged :]:
            row = row | {"data/bad_names": "; ".join(new)}
            state.bad_logged = len(state.bad_names)
        self._run.runtime.from_main(lambda: self._run.tracker.log(row))

    def left_s(self) -> float | None:
        """How long the rest of the stage will take, evaluations included, if it goes on as it went
        in this start; None: no step was taken."""
        steps = self._run.state.step - self._first_step
        if not steps:
            return None
        end = self._run.state.stage_first_step + self._stage.num_steps
        return (time.perf_counter() - self._began_at) / steps * (end - self._run.state.step)

    def waited(self, seconds: float) -> None:
        """Notes how long a step waited for the loader."""
        self._waited_s += seconds

    def speed(self) -> dict[str, float]:
        """Since the window was opened, and opens the next; ``data_wait`` is the share of the time
        that was spent waiting for the loader."""
        elapsed = time.perf_counter() - self._window_opened_at
        steps = self._run.state.step - self._window_first_step
        images, waited = steps * self._run.config.batch.total, self._waited_s
        self.restart_window()
        if not images:
            return {}
        return {
            "speed/images_per_second": round(images / elapsed, 2),
            "speed/data_wait": round(waited / elapsed, 4),
        }

    def restart_window(self) -> None:
        """From here on steps count for the next ``speed``."""
        self._window_opened_at = time.perf_counter()
        self._window_first_step = self._run.state.step
        self._waited_s = 0.0

    def _place(self) -> dict[str, Any]:
        state = self._run.state
        row = {
            "step": state.step,
            "epoch": round(self._run.epoch, 6),
            "stage": self._stage.name,
            "elapsed_s": round(self.elapsed_s(), 3),
        }
        if state.bad_samples:
            row["data/bad_samples"] = state.bad_samples
        if state.skipped_steps:
            row["train/skipped_steps"] = state.skipped_steps
        return row


def summary(row: dict[str, Any], task: Task, *, is_best: bool, left_s: float | None = None) -> str:
    """An evaluation's row as one line, with the time that is left of the stage."""
    judged = dict.fromkeys(f"val/{name}" for name in (task.headline, task.counted))
    shown = ("train/loss", f"train/{task.counted}", "val/loss", *judged)
    figures = "  ".join(f"{key} {row[key]:.4f}" for key in shown if key in row)
    line = f"epoch {row['epoch']:.2f}  step {row['step']}  {row['stage']}  {figures}"
    if is_best:
        line += "  (best)"
    if "speed/images_per_second" in row:
        line += f"  {row['speed/images_per_second']:,.0f} images/s"
    return line + (f"  {duration(left_s)} left" if left_s else "")
