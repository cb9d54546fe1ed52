"""What happens between two steps: agree on what was met, log, save, evaluate; in that order.

A checkpoint is saved before the evaluation of the same step, and records when the last evaluation
was, so that a run killed in between evaluates first when it goes on.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from rtl_dist.config import ResolvedStage
from rtl_dist.core.errors import DataError, RtlDistError, StopRequested
from rtl_dist.model.classifier import Classifier
from rtl_dist.optim.schedule import Due, falls_at_once, num_warmup_steps, what_is_due
from rtl_dist.records.state import Best
from rtl_dist.training.judging import is_better, judge_rate, judge_stage
from rtl_dist.training.run import Run
from rtl_dist.training.saving import save, save_best
from rtl_dist.training.stage_evaluator import StageEvaluator
from rtl_dist.training.stage_log import StageLog, summary
from rtl_dist.training.stage_trainer import StageTrainer, StepOutcome

LOG = logging.getLogger("rtl_dist")


class StepBoundary:
    """The step boundaries of one stage; ``cross`` one after each step.

    opened_at: ``time.perf_counter()`` when work on the stage began.
    """

    def __init__(
        self, stage: ResolvedStage, run: Run, trainer: StageTrainer, *, opened_at: float
    ) -> None:
        self._stage, self._run, self._trainer = stage, run, trainer
        self._end_step = run.state.stage_first_step + stage.num_steps
        self._log = StageLog(stage, run, opened_at=opened_at)
        self._evaluator = StageEvaluator(stage, run, trainer.network, trainer.features)

    @property
    def at_stage_end(self) -> bool:
        return self._run.state.step >= self._end_step or self._run.state.stopped_early

    @property
    def _steps_done(self) -> int:
        """Of the stage."""
        return self._run.state.step - self._run.state.stage_first_step

    def cross(self, outcome: StepOutcome) -> None:
        """All that is due after a step.

        Raises:
            StopRequested: on every rank, after saving. DataError: too many damaged samples.
            OutOfMemory: a microbatch did not fit; the step was not taken and does not count.
            RtlDistError: a rank's loader failed, or the loss is no longer finite; nothing was saved
                since.
        """
        self._run.state.elapsed_s = self._log.elapsed_s()
        self._log.waited(outcome.data_wait_s)
        if outcome.abandoned:
            self._stop()
        try:
            stop = self._act_on_agreement(outcome)
        except StopRequested:  # a loader's: the step was spoiled, and is not taken
            self._stop()
        self._stop_if_lost()
        due = self._due()
        if due.log:
            self._log_training()
        if stop:
            self._stop()
        if due.save:
            self._save()
        if due.evaluate:
            self._evaluate()
        self._run.state.elapsed_s = self._log.elapsed_s()

    def begin(self) -> None:
        """What is due before the first step: of a head that was solved, or of a run that goes on
        from just before an evaluation."""
        self._run.state.elapsed_s = self._log.elapsed_s()
        if self._due().evaluate:
            if self._run.state.last_checkpoint != self._run.state.step:
                self._save()
            self._evaluate()

    def _due(self) -> Due:
        config = self._run.config
        return what_is_due(
            self._run.state,
            at_stage_end=self.at_stage_end,
            log_every=config.run.log_every,
            save_every=config.checkpoint.every,
            eval_every=config.eval.every,
            num_samples=self._run.train.num_samples,
            global_batch_size=config.batch.total,
            rate_falls=falls_at_once(self._stage, self._steps_done),
        )

    def _act_on_agreement(self, outcome: StepOutcome) -> bool:
        """One exchange a step decides for all ranks; returns whether to stop."""
        run = self._run
        try:
            stop, num_bad = run.runtime.agree(
                bad_samples=len(outcome.bad),
                failure=outcome.failure or run.writer.failure,
            )
        except RtlDistError:
            self._trainer.optimizer.take_back()
            raise
        self._trainer.accept(outcome)
        if num_bad:
            self.count_bad(outcome.bad)
        if self._trainer.ledger:
            run.state.ledger_bytes = self._trainer.ledger.write()
        return stop

    def count_bad(self, met: list[str]) -> None:
        """Counts damaged samples that this rank met; called by all ranks.

        Raises:
            DataError: on every rank, if they are more than ``data.bad_samples``.
        """
        state, budget = self._run.state, self._run.config.data.bad_samples
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

    def _stop(self) -> NoReturn:
        run, state = self._run, self._run.state
        if state.last_checkpoint != state.step:
            self._save()
        run.wait_for_checkpoint()
        raise StopRequested(
            f"stopped at step {state.step} by {run.runtime.stop_reason} and saved; start the same"
            " command to go on"
        )

    def _stop_if_lost(self) -> None:
        """Ends a run of which no step is taken any more: after half of a stage's steps, or in fp16,
        where the first steps may go into finding the loss scale, after all of them."""
        stage, skipped = self._stage, self._trainer.skipped
        in_a_row = skipped.exact()[1] if self.at_stage_end else skipped.in_a_row
        cure = "lower its lr or set optim.clip_grad_norm"
        few = max(1, stage.num_steps // 2)
        if self._trainer.optimizer.scales_loss:
            few = stage.num_steps
            if few < stage.optim.skip_limit:
                cure = (
                    "give the stage more steps, in which fp16 finds the scale of the loss, set"
                    " precision to bf16 or no, or lower its lr"
                )
        if in_a_row >= min(stage.optim.skip_limit, few):
            self._trainer.fold_totals()
            raise RtlDistError(
                f"{in_a_row} steps in a row up to step {self._run.state.step} (stage"
                f" {stage.name}) were not taken, as their gradient was infinite or not a number;"
                f" {cure}, and use another run.dir; the last checkpoint here is of step"
                f" {self._run.state.last_checkpoint}"
            )

    def _log_training(self) -> None:
        state = self._run.state
        self._trainer.fold_totals()
        row = self._log.training_row()
        self._log.write(row | self._trainer.optimizer.rates | self._log.speed())
        state.since_log, state.last_log = [], state.step

    def _save(self) -> None:
        save(self._run, self._trainer, evaluation_is_due=self._due().evaluate)

    def _evaluate(self) -> None:
        """Evaluates, judges and logs."""
        run = self._run
        self._trainer.fold_totals()
        speed = self._log.speed()
        try:
            with run.runtime.heartbeat.phase("evaluating"), self._evaluator.model() as model:
                self._record(self._evaluator.metrics(model), model, speed)
        except StopRequested:
            self._stop()  # now that the model is again as it is trained
        self._log.restart_window()

    def _record(
        self, metrics: dict[str, float], model: Classifier, speed: dict[str, float]
    ) -> None:
        """Logs and judges what an evaluation found, and keeps the model if it is the best."""
        run, state = self._run, self._run.state
        row = self._log.evaluation_row(metrics)
        state.last_eval = state.last_log = state.step
        state.eval_was_due = False
        state.since_eval, state.since_log = [], []
        found = self._rated(row, run.config.early_stop.metric)
        is_best = is_better(found, state.best)
        if is_best:
            state.best = found
        self._judge_stage(row)
        # those of the last step; before a stage's first there was none
        rates = self._trainer.optimizer.rates if self._steps_done else {}
        row = row | rates | speed
        self._log.write(row)
        left_s = None if state.stopped_early else self._log.left_s()
        LOG.info("%s", summary(row, run.dataset.task, is_best=is_best, left_s=left_s))
        if state.stopped_early and state.step < self._end_step:
            LOG.info(
                "stage %s ends early: no better %s in its last %d evaluation(s)",
                self._stage.name,
                self._stage.early_stop.metric,
                state.evals_without_best,
            )
        if is_best:
            save_best(run, model)

    def _judge_stage(self, row: dict[str, Any]) -> None:
        """Counts the stage's patience, and keeps its best weights where it has some. All ranks
        judge alike, by equal metrics."""
        state, patience = self._run.state, self._stage.patience
        found = self._rated(row, self._stage.early_stop.metric)
        judgement = judge_stage(
            found,
            state.stage_best,
            evals_without_best=state.evals_without_best,
            patience=patience,
        )
        state.stage_best = judgement.best
        state.evals_without_best = judgement.evals_without_best
        state.stopped_early |= judgement.ends_stage
        if self._stage.schedule == "plateau":
            self._judge_rate(gained=judgement.evals_without_best == 0)
        if judgement.best is found and patience is not None:
            self._run.keep_as_stage_best()

    def _judge_rate(self, *, gained: bool) -> None:
        """Has the rate of the steps to come fall, if evaluations at this one bring nothing any
        more; those of a warm-up say nothing of it."""
        state, stage = self._run.state, self._stage
        if self._steps_done <= num_warmup_steps(stage.num_steps, stage.warmup):
            return
        falls, state.evals_at_rate = judge_rate(
            gained=gained, evals_at_rate=state.evals_at_rate, patience=stage.optim.patience
        )
        if falls:
            state.times_lowered += 1
            if not self.at_stage_end:
                LOG.info("stage %s: its learning rate falls, as nothing got better", stage.name)

    def _rated(self, row: dict[str, Any], metric: str) -> Best:
        return Best(
            value=row[metric],
            metric=metric,
            loss=row["val/loss"],
            step=self._run.state.step,
            epoch=self._run.epoch,
            stage=self._stage.name,
        )
