"""What happens between two steps: agree on what was met, log, save, evaluate; in that order.

A checkpoint is saved before the evaluation of the same step, and records when the last evaluation
was, so that a run killed in between evaluates first when it goes on.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from rtl_dist.config import ResolvedStage
from rtl_dist.core.errors import DataError, RtlDistError, StopRequested
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.folder import write_model_folder
from rtl_dist.optim.counts import add_counts, train_metrics
from rtl_dist.records.checkpoint import Snapshot
from rtl_dist.records.identity import run_identity
from rtl_dist.records.state import Best
from rtl_dist.training.run import Run
from rtl_dist.training.stage_evaluator import StageEvaluator
from rtl_dist.training.stage_trainer import StageTrainer

LOG = logging.getLogger("rtl_dist")


class StepBoundary:
    """The step boundaries of one stage; ``cross`` one after each step.

    opened_at: ``time.perf_counter()`` when work on the stage began.
    """

    def __init__(
        self,
        stage: ResolvedStage,
        run: Run,
        trainer: StageTrainer,
        *,
        opened_at: float,
    ) -> None:
        self._stage, self._run, self._trainer = stage, run, trainer
        self._num_steps = stage.num_steps
        self._end_step = run.state.stage_first_step + stage.num_steps
        self._elapsed_before_s = run.state.elapsed_s
        self._opened_at = opened_at
        self._evaluator = StageEvaluator(stage, run, trainer)
        self._restart_window()

    @property
    def at_stage_end(self) -> bool:
        return self._run.state.step >= self._end_step or self._run.state.stopped_early

    def cross(self) -> None:
        """All that is due at this step.

        Raises:
            StopRequested: on every rank, after saving. DataError: too many damaged samples.
            OutOfMemory: a microbatch did not fit; the step was not taken and does not count.
            RtlDistError: a rank's loader failed, or the loss is no longer finite; nothing was saved
                since.
        """
        self._run.state.elapsed_s = self._elapsed_s()
        if self._trainer.was_abandoned:
            self._stop()
        try:
            stop = self._act_on_agreement()
        except StopRequested:  # a loader's: the step was spoiled, and is not taken
            self._stop()
        self._stop_if_lost()
        self._log_if_due()
        if stop:
            self._stop()
        self._save_if_due()
        self.evaluate_if_due()
        self._run.state.elapsed_s = self._elapsed_s()

    def evaluate_if_due(self) -> None:
        """Evaluates, judges and logs; also called when a run goes on from just before this."""
        if not self._evaluation_is_due:
            return
        self.fold_totals()
        speed = self._speed()
        try:
            with self._evaluating(), self._evaluator.model() as model:
                self._record(self._evaluator.metrics(model), model, speed)
        except StopRequested:
            self._stop()  # now that the model is again as it is trained
        self._restart_window()

    def _evaluating(self) -> AbstractContextManager[None]:
        # what was compiled may be compiled again for other shapes
        return self._run.runtime.heartbeat.phase("evaluating", open_ended=self._trainer.is_compiled)

    def _record(
        self, metrics: dict[str, float], model: Classifier, speed: dict[str, float]
    ) -> None:
        """Logs and judges what an evaluation found, and keeps the model if it is the best."""
        run, state = self._run, self._run.state
        row = self._row() | train_metrics(state.since_eval, task=run.dataset.task)
        row |= {f"val/{name}": value for name, value in metrics.items()}
        for name in ("top1", "micro_f1"):
            if f"train/{name}" in row and name in metrics:
                row[f"gap/{name}"] = row[f"train/{name}"] - metrics[name]
        state.last_eval = state.last_log = state.step
        state.eval_was_due = False
        state.since_eval, state.since_log = [], []
        is_best = self._judge(row)
        self._judge_stage(row)
        self._log(row | self._trainer.rates | speed)
        LOG.info("%s", _summary(row, is_best))
        if state.stopped_early and state.step < self._end_step:
            LOG.info(
                "stage %s ends early: no better %s in its last %d evaluation(s)",
                self._stage.name,
                self._stage.early_stop.metric,
                state.evals_without_best,
            )
        if is_best:
            run.runtime.from_main(lambda: self._write_best(model))

    def _write_best(self, model: Classifier) -> None:
        run = self._run
        with run.runtime.heartbeat.phase("saving", open_ended=True):
            run.writer.wait()
            write_model_folder(run.folder / "best", model, run.config, run.dataset)

    @property
    def _evaluation_is_due(self) -> bool:
        state = self._run.state
        due = self.at_stage_end or self._run.is_due(self._run.config.eval.every, state.last_eval)
        return (due or state.eval_was_due) and state.last_eval != state.step

    def _act_on_agreement(self) -> bool:
        """One exchange a step decides for all ranks; returns whether to stop."""
        run = self._run
        try:
            stop, num_bad = run.runtime.agree(
                bad_samples=len(self._trainer.bad),
                failure=self._trainer.failure or run.writer.failure,
            )
        except RtlDistError:
            self._trainer.take_back()
            raise
        self._trainer.accept()
        if num_bad:
            self._count_bad()
        if self._trainer.ledger:
            run.state.ledger_bytes = self._trainer.ledger.write()
        return stop

    def _stop(self) -> NoReturn:
        run, state = self._run, self._run.state
        if state.last_checkpoint != state.step:
            self.save()
        run.wait_for_checkpoint()
        raise StopRequested(
            f"stopped at step {state.step} by {run.runtime.stop_reason} and saved; start the same"
            " command to go on"
        )

    def _stop_if_lost(self) -> None:
        """Ends a run of which no step is taken any more."""
        in_a_row = self._trainer.skipped.in_a_row
        if in_a_row >= min(self._run.config.optim.skip_limit, max(1, self._num_steps // 2)):
            self.fold_totals()
            raise RtlDistError(
                f"{in_a_row} steps in a row up to step {self._run.state.step} (stage"
                f" {self._stage.name}) were not taken, as their gradient was infinite or not a"
                " number; lower its lr or set optim.clip_grad_norm, and use another run.dir; the"
                f" last checkpoint here is of step {self._run.state.last_checkpoint}"
            )

    def _log_if_due(self) -> None:
        run, state = self._run, self._run.state
        if self._evaluation_is_due or not run.is_due(run.config.run.log_every, state.last_log):
            return  # an evaluation's row says all that this one would
        self.fold_totals()
        row = self._row() | train_metrics(state.since_log, task=run.dataset.task)
        self._log(row | self._trainer.rates | self._speed())
        state.since_log, state.last_log = [], state.step

    def _log(self, row: dict[str, Any]) -> None:
        state = self._run.state
        if new := state.bad_names[state.bad_logged :]:
            row = row | {"data/bad_names": "; ".join(new)}
            state.bad_logged = len(state.bad_names)
        self._run.runtime.from_main(lambda: self._run.tracker.log(row))

    def _save_if_due(self) -> None:
        run = self._run
        is_due = run.is_due(run.config.checkpoint.every, run.state.last_checkpoint)
        # before an evaluation too: the best weights must not be newer than what a run goes on from
        if self.at_stage_end or is_due or self._evaluation_is_due:
            self.save()

    def save(self) -> None:
        """Has a checkpoint of this very moment written, beside the steps that follow."""
        run, state = self._run, self._run.state
        self.fold_totals()
        self._trainer.require_sound()
        state.last_checkpoint = state.step
        state.eval_was_due = self._evaluation_is_due

        def save() -> None:
            state.metrics_bytes = run.tracker.num_bytes
            optimizer = self._trainer.optimizer_state()
            snapshot = Snapshot(
                state=state,
                model=run.model.state_dict(),
                optimizer=optimizer.tensors,
                ema=run.average.model.state_dict() if run.average else {},
                stage_best=run.stage_best,
                scaler=optimizer.scaler,
                identity=run_identity(run.config, run.dataset),
            )
            keep = run.config.checkpoint.keep
            run.writer.write(run.folder, snapshot, keep=keep, before=self._flush)

        # the checkpoint before may still be on its way to a slow disk
        with run.runtime.heartbeat.phase("saving", open_ended=run.runtime.is_main):
            run.runtime.from_main(save)

    def _flush(self) -> None:
        """Makes durable what a checkpoint refers to."""
        self._run.tracker.flush()
        if self._trainer.ledger:
            self._trainer.ledger.flush()

    def fold_totals(self) -> None:
        """Reads the device's counts; a deliberate wait for it, at logging and saving only."""
        state = self._run.state
        counts = self._trainer.totals.flush(self._run.runtime)
        state.skipped_steps, state.skipped_in_a_row = self._trainer.skipped.exact()
        state.since_log = add_counts(state.since_log, counts)
        state.since_eval = add_counts(state.since_eval, counts)

    def _count_bad(self) -> None:
        state, budget = self._run.state, self._run.config.data.bad_samples
        met, self._trainer.bad = self._trainer.bad, []
        gathered = self._run.runtime.gather(met)
        for name in sorted({name for names in gathered for name in names}):
            if name not in state.bad_names:
                state.bad_samples += 1
                state.bad_names = [*state.bad_names, name]
                if state.bad_samples <= budget:
                    LOG.warning("replaced by another sample: %s", name)
        if state.bad_samples > budget:
            raise DataError(
                f"{state.bad_samples} damaged sample(s), data.bad_samples allows {budget}:"
                f" {state.bad_names[-1]}; `rtl-dist verify {self._run.dataset.where}` tells of"
                " all"
            )

    def _judge(self, row: dict[str, Any]) -> bool:
        """Whether an evaluation is the best so far. All ranks judge alike, by equal metrics."""
        found = self._rated(row, self._run.config.early_stop.metric)
        is_best = _is_better(found, self._run.state.best)
        if is_best:
            self._run.state.best = found
        return is_best

    def _judge_stage(self, row: dict[str, Any]) -> None:
        """Counts the stage's patience, and keeps its best weights where it has some."""
        run, state = self._run, self._run.state
        patience = self._stage.patience
        metric = self._stage.early_stop.metric
        found, best = self._rated(row, metric), state.stage_best
        if _is_better(found, best):
            state.stage_best = found
            if patience is not None:
                run.keep_as_stage_best()
        if best is None or (best.value != found.value and state.stage_best is found):
            state.evals_without_best = 0
            return
        state.evals_without_best += 1  # an equal metric at a lower loss is no reason to go on
        if patience is not None and state.evals_without_best >= patience:
            state.stopped_early = True

    def _rated(self, row: dict[str, Any], metric: str) -> Best:
        return Best(
            value=row[metric],
            metric=metric,
            loss=row["val/loss"],
            step=self._run.state.step,
            epoch=self._run.epoch,
            stage=self._stage.name,
        )

    def _elapsed_s(self) -> float:
        return self._elapsed_before_s + time.perf_counter() - self._opened_at

    def _row(self) -> dict[str, Any]:
        state = self._run.state
        row = {
            "step": state.step,
            "epoch": round(self._run.epoch, 6),
            "stage": self._stage.name,
            "elapsed_s": round(self._elapsed_s(), 3),
        }
        if state.bad_samples:
            row["data/bad_samples"] = state.bad_samples
        if state.skipped_steps:
            row["train/skipped_steps"] = state.skipped_steps
        return row

    def _speed(self) -> dict[str, float]:
        """Since the last row; ``data_wait`` is the share of time spent waiting for the loader."""
        elapsed = time.perf_counter() - self._window_opened_at
        images = (self._run.state.step - self._window_first_step) * self._run.config.batch.global_
        waited = self._trainer.data_wait_s
        self._restart_window()
        if not images:
            return {}
        return {
            "speed/images_per_second": round(images / elapsed, 2),
            "speed/data_wait": round(waited / elapsed, 4),
        }

    def _restart_window(self) -> None:
        self._window_opened_at = time.perf_counter()
        self._window_first_step = self._run.state.step
        self._trainer.data_wait_s = 0.0


def _is_better(found: Best, best: Best | None) -> bool:
    """A better metric, or an equal one (small splits have many ties) at a lower loss."""
    if best is None or best.metric != found.metric:
        return True
    sign = -1 if found.metric == "val/loss" else 1
    return (sign * found.value, -found.loss) > (sign * best.value, -best.loss)


def _summary(row: dict[str, Any], is_best: bool) -> str:
    shown = (
        "train/loss",
        "train/top1",
        "train/micro_f1",
        "val/loss",
        "val/top1",
        "val/map",
        "val/micro_f1",
    )
    figures = "  ".join(f"{key} {row[key]:.4f}" for key in shown if key in row)
    best = "  (best)" if is_best else ""
    return f"epoch {row['epoch']:.2f}  step {row['step']}  {row['stage']}  {figures}{best}"
