"""One stage's optimizer steps: everything the stage needs is built afresh, then steps are taken."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings

import torch
from accelerate.optimizer import AcceleratedOptimizer

from rtl_dist.batches import StageBatches, open_stage_batches
from rtl_dist.checkpoint import Snapshot, restore_optimizer
from rtl_dist.config import Stage
from rtl_dist.data.order import derive_key
from rtl_dist.data.ring import Batch
from rtl_dist.errors import RtlDistError
from rtl_dist.job import Job
from rtl_dist.ledger import Ledger
from rtl_dist.mixing import make_mixer
from rtl_dist.model.batchnorm import StepStatistics
from rtl_dist.model.classifier import HeadOnly
from rtl_dist.model.parts import (
    digest,
    freeze_for,
    frozen_tensors,
    parameters_without_gradient,
    trainable_tensors,
)
from rtl_dist.optim import build_optimizer, make_loss, set_learning_rates
from rtl_dist.schedule import StageSpan, learning_rate_factor
from rtl_dist.totals import TrainTotals

LOG = logging.getLogger("rtl_dist")
_FORWARD_STREAM = 3  # keys dropout and mixup apart from the data order and the augmentation


class StageTrainer:
    """Takes the steps of one stage.

    What happens at step boundaries looks at its public attributes: ``totals`` (counts since last
    flushed), ``bad`` (damaged samples met since last cleared), ``failure`` (of the loader),
    ``rates`` (of the last step),
    ``data_wait_s`` (since last cleared), ``on_features`` (the trunk is frozen and not run),
    ``ledger``, ``optimizer``, ``scaler`` and ``names`` (of parameters, by id).
    """

    def __init__(self, stage: Stage, span: StageSpan, job: Job, restored: Snapshot | None) -> None:
        self._stage, self._job, self._num_steps = stage, job, span.num_steps
        config, runtime, model = job.config, job.runtime, job.model
        freeze_for(model, stage)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = build_optimizer(model, stage, config.optim)
        if restored is not None and restored.optimizer:
            restore_optimizer(self.optimizer, self.names, restored.optimizer)
        self.rates = self._set_rates(max(0, job.state.step - job.state.stage_first_step - 1))
        self._batches: StageBatches = open_stage_batches(
            stage,
            config=config,
            model=model,
            split=job.train,
            runtime=runtime,
            first_step=job.state.step,
            end_step=job.state.stage_first_step + span.num_steps,
            micro_batch_size=job.micro_batch_size,
            workers=job.workers,
        )
        self.on_features = self._batches.are_features
        module = HeadOnly(model) if self.on_features else model
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; its old name serves every version we support
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._wrapped, self._stepper = runtime.accelerator.prepare(
                module,
                self.optimizer,
                device_placement=[True, False],  # restored state is where it belongs already
            )
        if config.compile is True:
            self._wrapped = torch.compile(self._wrapped)
        self.scaler = runtime.accelerator.scaler
        if restored is not None and restored.scaler and self.scaler is not None:
            self.scaler.load_state_dict(restored.scaler)
        self._statistics = StepStatistics(model)
        task = job.dataset.task
        counts = job.train.class_counts
        self._loss = make_loss(config.optim, task=task, class_counts=counts, device=runtime.device)
        self._mix = make_mixer(config.augment, num_classes=job.dataset.num_classes)
        self.totals = TrainTotals(task=task, device=runtime.device)
        self.ledger = Ledger(job.run, runtime, job.state) if config.run.ledger else None
        self.bad: list[str] = list(self._batches.bad)
        self.failure: RtlDistError | None = None
        self.data_wait_s = 0.0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients_checked = False
        self._frozen_digest = digest(frozen_tensors(model))
        runtime.require_equal("the frozen weights", self._frozen_digest)
        self.require_sound()
        LOG.info("stage %s: %s", stage.name, self._describe())

    def step(self) -> None:
        """One optimizer step over this rank's microbatches of the global batch."""
        job, state, accelerator = self._job, self._job.state, self._job.runtime.accelerator
        self.rates = self._set_rates(state.step - state.stage_first_step)
        per_rank = job.config.batch.global_ // job.micro_batch_size // job.runtime.world_size
        self._statistics.begin()
        for i in range(per_rank):
            last = i == per_rank - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped):
                self._microbatch(job.runtime.rank * per_rank + i, per_rank)
        if not self._gradients_checked and self.failure is None:
            self._check_gradients()
        if job.config.optim.clip_grad_norm is not None:
            accelerator.clip_grad_norm_(self._parameters, job.config.optim.clip_grad_norm)
        was_taken = take_step(self._stepper, self.scaler)
        self._stepper.zero_grad(set_to_none=True)
        if not was_taken:
            self._statistics.discard()
            state.skipped_steps += 1
        else:
            self._statistics.fold(job.runtime.mean_over_ranks)
            if job.average:
                job.average.update(job.model)
        state.step += 1
        state.samples_seen += job.config.batch.global_

    def require_sound(self) -> None:
        """Proves that frozen weights and statistics have not moved and that the ranks agree.

        Raises:
            RuntimeError: on every rank.
        """
        model, runtime = self._job.model, self._job.runtime
        moved = digest(frozen_tensors(model)) != self._frozen_digest
        if any(runtime.gather(moved)):
            raise RuntimeError(f"stage {self._stage.name}: a frozen weight or statistic moved")
        runtime.require_equal("the trainable weights", digest(trainable_tensors(model)))

    def close(self) -> None:
        """Ends the workers and takes the wrapping off the model."""
        accelerator = self._job.runtime.accelerator
        self._statistics.close()
        self._batches.close()
        accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        accelerator.free_memory()

    def _set_rates(self, step_in_stage: int) -> dict[str, float]:
        optim = self._job.config.optim
        factor = learning_rate_factor(
            step_in_stage, num_steps=self._num_steps, warmup=optim.warmup, shape=optim.schedule
        )
        return set_learning_rates(self.optimizer, factor)

    def _microbatch(self, microbatch: int, per_rank: int) -> None:
        job = self._job
        batch = self._next_batch()
        self.bad += batch.bad
        if self.ledger and self.failure is None:
            self.ledger.note(job.state.step, microbatch, batch)
        inputs, labels = batch.inputs, batch.labels
        torch.manual_seed(
            derive_key(job.config.seed, _FORWARD_STREAM, job.state.step, microbatch) >> 1
        )
        mixed, targets = self._mix(inputs, labels)
        scores = self._wrapped(mixed)
        losses = self._loss(scores, targets)
        job.runtime.accelerator.backward(losses.sum() / (len(losses) * per_rank))
        self._statistics.add()
        self.totals.add(losses.detach(), scores.detach(), labels)

    def _next_batch(self) -> Batch:
        """The next microbatch. If there is none because the loader failed, an empty-handed stand-in
        finishes the step, in whose collectives the other ranks wait; at its boundary all ranks end
        together and nothing of it is kept."""
        asked_at = time.perf_counter()
        if self.failure is None:
            try:
                batch = next(self._batches.iterator)
            except RtlDistError as error:
                self.failure = error
        if self.failure is not None:
            batch = self._batches.stand_in
        self.data_wait_s += time.perf_counter() - asked_at
        return batch

    def _check_gradients(self) -> None:
        """A parameter that DDP or the compiler forgot would silently never learn."""
        without = parameters_without_gradient(self._job.model.named_parameters())
        if without:
            raise RuntimeError(f"stage {self._stage.name}: no gradient reached {without}")
        self._gradients_checked = True

    def _describe(self) -> str:
        trained = sum(p.numel() for p in self._parameters)
        total = sum(p.numel() for p in self._job.model.parameters())
        how = ", on cached features" if self.on_features else ""
        return (
            f"{self._num_steps} steps of {self._job.config.batch.global_} images, training"
            f" {trained:,} of {total:,} parameters{how}"
        )


def take_step(stepper: AcceleratedOptimizer, scaler: torch.amp.GradScaler | None) -> bool:
    """Steps the optimizer; False if the loss scaler skipped the step because of an overflow.

    Accelerate's ``optimizer_step_was_skipped`` is always False with a fused optimizer, which
    handles the overflow within its own step; a scale that fell says it in either case. Reading the
    scale waits for the device; with loss scaling (fp16) a step does so anyway.
    """
    before = scaler.get_scale() if scaler is not None else 0.0
    stepper.step()
    return scaler is None or scaler.get_scale() >= before
