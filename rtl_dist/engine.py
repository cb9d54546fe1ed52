"""Training: one stage after another, one optimizer step after another.

``fit`` is the story of a stage. At each step boundary the order is fixed: agree on what happened,
log, save, then evaluate; so a kill at any moment leaves a checkpoint from which the same things
happen again in the same order.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtl_dist.batches import StageBatches, open_stage_batches
from rtl_dist.checkpoint import Snapshot, optimizer_tensors, restore_optimizer, save_checkpoint
from rtl_dist.config import Config, Stage
from rtl_dist.data.dataset import Dataset, Split
from rtl_dist.data.order import derive_key
from rtl_dist.ema import Average
from rtl_dist.errors import DataError, RtlDistError, StopRequested
from rtl_dist.evaluation import evaluate_split
from rtl_dist.ledger import Ledger
from rtl_dist.mixing import make_mixer
from rtl_dist.model.batchnorm import StepStatistics
from rtl_dist.model.classifier import Classifier, HeadOnly
from rtl_dist.model.folder import write_model_folder
from rtl_dist.model.parts import (
    digest,
    freeze_for,
    frozen_tensors,
    parameters_without_gradient,
    set_modes,
    trainable_tensors,
)
from rtl_dist.optim import build_optimizer, make_loss, set_learning_rates
from rtl_dist.run_folder import run_identity
from rtl_dist.runtime import Runtime
from rtl_dist.schedule import Every, StageSpan, is_due, learning_rate_factor
from rtl_dist.state import Best, TrainState
from rtl_dist.totals import TrainTotals, add_counts, non_finite, train_metrics
from rtl_dist.tracking import Tracker

LOG = logging.getLogger("rtl_dist")
_FORWARD_STREAM = 3  # keys dropout and mixup apart from the order (0) and augmentation (1)
_NAMES_KEPT = 100


@dataclass(kw_only=True)
class Job:
    """What every stage of a run works with."""

    config: Config
    runtime: Runtime
    run: Path
    dataset: Dataset
    train: Split
    val: Split
    model: Classifier
    average: Average | None
    tracker: Tracker
    state: TrainState
    micro_batch_size: int
    workers: int

    @property
    def evaluated_model(self) -> Classifier:
        """The averaged weights where there are such, else the trained ones."""
        return self.average.model if self.average else self.model

    @property
    def epoch(self) -> float:
        return self.state.samples_seen / self.train.num_samples

    def is_due(self, every: Every, last: int) -> bool:
        return is_due(self.state.step, every, last=last, num_samples=self.train.num_samples,
                      global_batch_size=self.config.batch.global_)  # fmt: skip


def fit(stage: Stage, span: StageSpan, job: Job, restored: Snapshot | None) -> None:
    """Trains one stage to its end, or to where it is stopped.

    Args:
        restored: the checkpoint to go on from, if it lies within this stage.

    Raises:
        StopRequested: every rank agreed to stop; a checkpoint was saved.
        DataError: more damaged samples than ``data.bad_samples``.
        RtlDistError: the loss is no longer finite.
    """
    training = _StageTraining(stage, span, job, restored)
    try:
        training.evaluate_if_due()
        with job.runtime.progress(total=span.num_steps, what=stage.name, unit="step",
                                  done=job.state.step - job.state.stage_first_step) as bar:  # fmt: skip
            while not training.at_end:
                training.step()
                bar.update()
                training.act_on_agreement()
                training.log_if_due()
                training.save_if_due()
                training.evaluate_if_due()
    finally:
        training.close()
    job.state.stage += 1
    job.state.stage_first_step = job.state.step
    job.state.evals_without_best = 0
    job.state.stopped_early = False


class _StageTraining:
    """One stage in the making: its optimizer, wrapped model, batches and checks, built afresh."""

    def __init__(self, stage: Stage, span: StageSpan, job: Job, restored: Snapshot | None) -> None:
        self.stage, self.job = stage, job
        config, runtime, model = job.config, job.runtime, job.model
        self.num_steps = span.num_steps
        self.end_step = job.state.stage_first_step + span.num_steps
        freeze_for(model, stage)
        optimizer = build_optimizer(model, stage, config.optim)
        self._names = {id(p): name for name, p in model.named_parameters()}
        if restored is not None and restored.optimizer:
            restore_optimizer(optimizer, self._names, restored.optimizer)
        self._started_at = time.perf_counter()
        self.batches: StageBatches = open_stage_batches(
            stage, config=config, model=model, split=job.train, runtime=runtime,
            first_step=job.state.step, end_step=self.end_step,
            micro_batch_size=job.micro_batch_size, workers=job.workers,
        )  # fmt: skip
        module = HeadOnly(model) if self.batches.are_features else model
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; its old name serves every version we support
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.module, self.optimizer = runtime.accelerator.prepare(module, optimizer)
        if config.compile is True:
            self.module = torch.compile(self.module)
        self.scaler = runtime.accelerator.scaler
        if restored is not None and restored.scaler and self.scaler is not None:
            self.scaler.load_state_dict(restored.scaler)
        self.statistics = StepStatistics(model)
        self.totals = TrainTotals(task=job.dataset.task, device=runtime.device)
        self.loss = make_loss(config.optim, task=job.dataset.task, device=runtime.device,
                              class_counts=job.train.class_counts)  # fmt: skip
        self.mix = make_mixer(config.augment, num_classes=job.dataset.num_classes)
        self.ledger = Ledger(job.run, runtime, job.state) if config.run.ledger else None
        self.frozen_digest = digest(frozen_tensors(model))
        runtime.require_equal("the frozen weights", self.frozen_digest)
        runtime.require_equal("the trainable weights", digest(trainable_tensors(model)))
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients_checked = False
        self._bad: list[str] = list(self.batches.bad)
        self._rates: dict[str, float] = {}
        self._data_wait_s = 0.0
        self._window_started_at = time.perf_counter()
        self._window_first_step = job.state.step
        LOG.info("stage %s: %s", stage.name, self._describe())

    @property
    def at_end(self) -> bool:
        return self.job.state.step >= self.end_step or self.job.state.stopped_early

    # --- one step ------------------------------------------------------------------------------

    def step(self) -> None:
        """One optimizer step over this rank's microbatches of the global batch."""
        job, state, accelerator = self.job, self.job.state, self.job.runtime.accelerator
        factor = learning_rate_factor(
            state.step - state.stage_first_step, num_steps=self.num_steps,
            warmup=job.config.optim.warmup, shape=job.config.optim.schedule,
        )  # fmt: skip
        self._rates = set_learning_rates(self.optimizer, factor)
        per_rank = job.config.batch.global_ // job.micro_batch_size // job.runtime.world_size
        self.statistics.begin()
        for i in range(per_rank):
            last = i == per_rank - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.module):
                self._microbatch(job.runtime.rank * per_rank + i, per_rank)
        if not self._gradients_checked:
            self._check_gradients()
        if job.config.optim.clip_grad_norm is not None:
            accelerator.clip_grad_norm_(self._parameters, job.config.optim.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if accelerator.optimizer_step_was_skipped:
            self.statistics.discard()
            state.skipped_steps += 1
        else:
            self.statistics.fold(job.runtime.mean_over_ranks)
            if job.average:
                job.average.update(job.model)
        state.step += 1
        state.samples_seen += job.config.batch.global_

    def _microbatch(self, microbatch: int, per_rank: int) -> None:
        job, device = self.job, self.job.runtime.device
        asked_at = time.perf_counter()
        batch = next(self.batches.iterator)
        self._data_wait_s += time.perf_counter() - asked_at
        self._bad += batch.bad
        if self.ledger:
            self.ledger.note(job.state.step, microbatch, batch)
        inputs = batch.inputs.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        torch.manual_seed(
            derive_key(job.config.seed, _FORWARD_STREAM, job.state.step, microbatch) >> 1
        )
        mixed, targets = self.mix(inputs, labels)
        scores = self.module(mixed)
        losses = self.loss(scores, targets)
        job.runtime.accelerator.backward(losses.sum() / (len(losses) * per_rank))
        self.statistics.add()
        self.totals.add(losses.detach(), scores.detach(), labels)

    def _check_gradients(self) -> None:
        """A parameter that DDP or the compiler forgot would silently never learn."""
        without = parameters_without_gradient(self.job.model.named_parameters())
        if without:
            raise RuntimeError(f"stage {self.stage.name}: no gradient reached {without}")
        self._gradients_checked = True

    # --- step boundaries -----------------------------------------------------------------------

    def act_on_agreement(self) -> None:
        """One exchange a step decides for all ranks: damaged samples, the ledger, stopping."""
        job = self.job
        stop, num_bad = job.runtime.agree(bad_samples=len(self._bad))
        if num_bad:
            self._count_bad()
        if self.ledger:
            job.state.ledger_bytes = self.ledger.write()
        if stop:
            self._fold_totals()
            self._save()
            raise StopRequested(
                f"stopped at step {job.state.step} and saved; start the same command to go on"
            )

    def log_if_due(self) -> None:
        job, state = self.job, self.job.state
        if self._evaluation_is_due or not job.is_due(job.config.run.log_every, state.last_log):
            return  # an evaluation's row says all that this one would
        self._fold_totals()
        row = self._row() | train_metrics(state.since_log, task=job.dataset.task)
        job.tracker.log(row | self._rates | self._speed())
        state.since_log, state.last_log = [], state.step

    def save_if_due(self) -> None:
        job = self.job
        if self.at_end or job.is_due(job.config.checkpoint.every, job.state.last_checkpoint):
            self._fold_totals()
            self._save()

    def evaluate_if_due(self) -> None:
        job, state = self.job, self.job.state
        if not self._evaluation_is_due:
            return
        self._fold_totals()
        speed = self._speed()
        metrics = evaluate_split(job.evaluated_model, job.dataset, job.val, runtime=job.runtime,
                                 workers=job.workers)  # fmt: skip
        set_modes(job.model, self.stage)
        row = self._row() | train_metrics(state.since_eval, task=job.dataset.task)
        row |= {f"val/{name}": value for name, value in metrics.items()}
        for name in ("top1", "micro_f1"):
            if f"train/{name}" in row and name in metrics:
                row[f"gap/{name}"] = row[f"train/{name}"] - metrics[name]
        state.last_eval = state.last_log = state.step
        state.since_eval, state.since_log = [], []
        is_best = self._judge(row)
        job.tracker.log(row | self._rates | speed)
        LOG.info("%s", _summary(row, is_best))
        if is_best and job.runtime.is_main:
            write_model_folder(job.run / "best", job.evaluated_model, job.config, job.dataset)
        self._restart_window()

    def close(self) -> None:
        self.statistics.close()
        self.batches.close()
        self.job.runtime.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        self.job.runtime.accelerator.free_memory()
        self.job.state.elapsed_s += time.perf_counter() - self._started_at

    @property
    def _evaluation_is_due(self) -> bool:
        state = self.job.state
        due = self.at_end or self.job.is_due(self.job.config.eval.every, state.last_eval)
        return due and state.last_eval != state.step

    # --- parts of the above --------------------------------------------------------------------

    def _judge(self, row: dict[str, Any]) -> bool:
        """Whether an evaluation is the best so far; counts patience. Equal on every rank, since the
        metrics are."""
        state, early_stop = self.job.state, self.job.config.early_stop
        metric = early_stop.metric
        if metric not in row:
            raise RtlDistError(f"early_stop.metric: {metric} is not measured on this data; choose"
                               f" from {[key for key in row if key.startswith('val/')]}")  # fmt: skip
        sign = -1 if metric == "val/loss" else 1
        if state.best is None or sign * row[metric] > sign * state.best.value:
            state.best = Best(value=row[metric], metric=metric, step=state.step,
                              epoch=self.job.epoch, stage=self.stage.name)  # fmt: skip
            state.evals_without_best = 0
            return True
        state.evals_without_best += 1
        if early_stop.patience is not None and state.evals_without_best >= early_stop.patience:
            state.stopped_early = True
            LOG.info("stage %s ends: %d evaluations without a better %s", self.stage.name,
                     state.evals_without_best, metric)  # fmt: skip
        return False

    def _save(self) -> None:
        job, state = self.job, self.job.state
        self._check_frozen()
        state.last_checkpoint = state.step
        state.metrics_bytes = job.tracker.flush()
        elapsed = state.elapsed_s + time.perf_counter() - self._started_at
        if job.runtime.is_main:
            saved = TrainState.from_dict(state.to_dict() | {"elapsed_s": elapsed})
            snapshot = Snapshot(
                state=saved,
                model=job.model.state_dict(),
                optimizer=optimizer_tensors(_bare(self.optimizer), self._names),
                ema=job.average.model.state_dict() if job.average else {},
                scaler=self.scaler.state_dict() if self.scaler is not None else {},
                identity=run_identity(job.config, job.dataset),
            )
            save_checkpoint(job.run, snapshot, keep=job.config.checkpoint.keep)

    def _check_frozen(self) -> None:
        now = digest(frozen_tensors(self.job.model))
        if now != self.frozen_digest:
            raise RuntimeError(f"stage {self.stage.name}: a frozen weight or statistic moved")
        self.job.runtime.require_equal(
            "the trained weights", digest(trainable_tensors(self.job.model))
        )

    def _fold_totals(self) -> None:
        """Reads the device's counts; a deliberate wait for it, at logging and saving only."""
        state = self.job.state
        counts = self.totals.flush(self.job.runtime)
        allowed = counts[0] // 2 if self.job.runtime.precision == "fp16" else 0
        if non_finite(counts) > allowed:
            raise RtlDistError(
                f"the loss became infinite or not a number by step {state.step} (stage"
                f" {self.stage.name}); lower its lr or set optim.clip_grad_norm, and start again:"
                f" the last checkpoint, of step {state.last_checkpoint}, is from before"
            )
        state.since_log = add_counts(state.since_log, counts)
        state.since_eval = add_counts(state.since_eval, counts)

    def _count_bad(self) -> None:
        state, budget = self.job.state, self.job.config.data.bad_samples
        names = sorted({name for names in self.job.runtime.gather(self._bad) for name in names})
        self._bad.clear()
        for name in names:
            if name not in state.bad_names:
                state.bad_samples += 1
                LOG.warning("replaced by another sample: %s", name)
                state.bad_names = [*state.bad_names, name][: _NAMES_KEPT + budget]
        if state.bad_samples > budget:
            raise DataError(
                f"{state.bad_samples} damaged sample(s), data.bad_samples allows {budget}:"
                f" {state.bad_names[-1]}"
            )

    def _row(self) -> dict[str, Any]:
        state = self.job.state
        elapsed = state.elapsed_s + time.perf_counter() - self._started_at
        return {"step": state.step, "epoch": round(self.job.epoch, 6), "stage": self.stage.name,
                "elapsed_s": round(elapsed, 3)}  # fmt: skip

    def _speed(self) -> dict[str, float]:
        """Since the last call; ``data_wait`` is the share of time spent waiting for the loader."""
        elapsed = time.perf_counter() - self._window_started_at
        steps = self.job.state.step - self._window_first_step
        speed = {
            "speed/images_per_second": round(steps * self.job.config.batch.global_ / elapsed, 2),
            "speed/data_wait": round(self._data_wait_s / elapsed, 4),
        }
        self._restart_window()
        return speed if steps else {}

    def _restart_window(self) -> None:
        self._window_started_at, self._data_wait_s = time.perf_counter(), 0.0
        self._window_first_step = self.job.state.step

    def _describe(self) -> str:
        trained = sum(p.numel() for p in self._parameters)
        total = sum(p.numel() for p in self.job.model.parameters())
        how = ", on cached features" if self.batches.are_features else ""
        return (
            f"{self.num_steps} steps of {self.job.config.batch.global_} images, training"
            f" {trained:,} of {total:,} parameters{how}"
        )


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _summary(row: dict[str, Any], is_best: bool) -> str:
    shown = ("train/loss", "train/top1", "train/micro_f1", "val/loss", "val/top1", "val/map",
             "val/micro_f1")  # fmt: skip
    figures = "  ".join(f"{key} {row[key]:.4f}" for key in shown if key in row)
    best = "  (best)" if is_best else ""
    return f"epoch {row['epoch']:.2f}  step {row['step']}  {row['stage']}  {figures}{best}"
