"""One stage's optimizer steps: everything the stage needs is built afresh, then steps are taken."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings

import torch

from rtl_dist.config import ResolvedStage
from rtl_dist.core.errors import OutOfMemory, RtlDistError
from rtl_dist.core.keys import derive_key
from rtl_dist.data.loading.batch import Batch
from rtl_dist.features.maker import FeatureMaker
from rtl_dist.model.batchnorm import StepStatistics
from rtl_dist.model.divided import divide
from rtl_dist.model.freezing import (
    digest,
    freeze_for,
    frozen_tensors,
    parameters_without_gradient,
    trainable_tensors,
)
from rtl_dist.model.parts import first_trainable_part
from rtl_dist.optim.counts import TrainTotals
from rtl_dist.optim.losses import make_loss
from rtl_dist.optim.mixing import make_mixer
from rtl_dist.optim.named_state import optimizer_tensors, restore_optimizer
from rtl_dist.optim.optimizer import build_optimizer, require_learning_rates, set_learning_rates
from rtl_dist.optim.schedule import learning_rate_factor
from rtl_dist.optim.skipped import SkippedSteps
from rtl_dist.records.ledger import Ledger
from rtl_dist.training.batches import StageBatches, open_stage_batches
from rtl_dist.training.compilation import compiling_pays
from rtl_dist.training.run import Run
from rtl_dist.training.stage_optimizer import OptimizerState, take_scaled_step

LOG = logging.getLogger("rtl_dist")
_FORWARD_STREAM = 3  # keys dropout and mixup apart from the data order and the augmentation
_STAND_IN_SIZE = 2  # images


class StageTrainer:
    """Takes the steps of one stage.

    What happens at step boundaries looks at its public attributes: ``totals`` (counts since last
    flushed), ``skipped`` (steps not taken), ``bad`` (damaged samples met since last cleared),
    ``failure`` (of the loader or the memory: the step was spoiled on purpose), ``was_abandoned``
    (the step, by all ranks, as one was asked to stop), ``rates`` (of the
    last step), ``data_wait_s`` (since last cleared), ``boundary`` (the first trained part),
    ``frozen`` and ``trained`` (the model, cut below it), ``features`` (of the frozen part),
    ``on_features`` (the frozen part is not run), ``is_compiled``, ``ledger``.
    """

    def __init__(
        self,
        stage: ResolvedStage,
        run: Run,
        kept: OptimizerState | None = None,
        *,
        lr: float,
        num_steps: int | None = None,
    ) -> None:
        """
        Args:
            kept: of an optimizer to go on with.
            lr: of the head, the stage's own or what was found for it.
            num_steps: to read data for; None: what is left of the stage.
        """
        self._stage, self._run, self._num_steps = stage, run, stage.num_steps
        config, runtime, model, state = run.config, run.runtime, run.model, run.state
        freeze_for(model, stage)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(model, stage, config.optim, lr=lr)
        if kept is not None and kept.tensors:
            restore_optimizer(self._optimizer, self._names, kept.tensors)
        self._warmup, self._shape = stage.warmup, stage.schedule
        done = state.step - state.stage_first_step
        self.rates = set_learning_rates(self._optimizer, self._planned_factor(max(0, done - 1)))
        self.boundary = first_trainable_part(model, stage)
        divided = divide(model, self.boundary, dtype=runtime.autocast_dtype)
        self.frozen, self.trained = divided.frozen, divided.trained
        self.features = self._feature_maker()
        left = state.stage_first_step + stage.num_steps - state.step
        self._batches: StageBatches = open_stage_batches(
            stage,
            config=config,
            split=run.train,
            features=self.features,
            num_classes=run.dataset.num_classes,
            runtime=runtime,
            first_step=state.step,
            end_step=state.step + (left if num_steps is None else num_steps),
            micro_batch_size=run.micro_batch_size,
            workers=run.workers,
        )
        self.on_features = self._batches.are_features
        self._wrap(kept)
        self._statistics = StepStatistics(model)  # once wrapped: that puts other tensors in buffers
        if runtime.world_size > 1:
            self._settle_gradient_buckets()
        self._compile()
        task = run.dataset.task
        self._loss = make_loss(
            config.optim, task=task, class_counts=run.train.class_counts, device=runtime.device
        )
        self._mix = make_mixer(stage.augment, num_classes=run.dataset.num_classes)
        self.totals = TrainTotals(task=task, device=runtime.device)
        self.skipped = SkippedSteps(
            runtime.device, total=state.skipped_steps, in_a_row=state.skipped_in_a_row
        )
        self.ledger = Ledger(run.folder, runtime, state) if config.run.ledger else None
        self.bad: list[str] = list(self._batches.bad)
        self.failure: RtlDistError | None = None
        self.was_abandoned = False
        self.data_wait_s = 0.0
        self._gradients_checked = False
        self._frozen_digest = digest(frozen_tensors(model))
        runtime.require_equal("the frozen weights", self._frozen_digest)
        self._require_agreement()

    def step(self, rate_factor: float | None = None) -> None:
        """One optimizer step over this rank's microbatches of the global batch; it counts once the
        ranks have agreed that none of them failed. If one is asked to stop meanwhile, it is given
        up between two microbatches.

        Args:
            rate_factor: of the learning rates; None: the schedule's.
        """
        run, state, accelerator = self._run, self._run.state, self._run.runtime.accelerator
        if rate_factor is None:
            rate_factor = self._planned_factor(state.step - state.stage_first_step)
        self.rates = set_learning_rates(self._optimizer, rate_factor)
        per_rank = run.config.batch.global_ // run.micro_batch_size // run.runtime.world_size
        self._statistics.begin()
        for i in range(per_rank):
            if per_rank > 1 and run.runtime.asked_to_stop():
                self._abandon()
                return
            last = i == per_rank - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped):
                self._microbatch(run.runtime.rank * per_rank + i, per_rank, last=last)
        if not self._gradients_checked and self.failure is None:
            self._check_gradients()
        taken = self._take_step()
        self._stepper.zero_grad(set_to_none=True)
        self._statistics.fold(run.runtime.mean_over_ranks, taken=taken)
        if run.average:
            run.average.update(run.model, taken=taken)
        self._taken = taken
        require_learning_rates(self._optimizer, rate_factor)

    def _abandon(self) -> None:
        self.was_abandoned = True
        self._forget_step()

    def _forget_step(self) -> None:
        """As if this step had not begun."""
        self._stepper.zero_grad(set_to_none=True)
        self._statistics.put_back()

    def accept(self) -> None:
        """Counts the last step."""
        self.totals.accept()
        self.skipped.note(self._taken)
        self._run.state.step += 1
        self._run.state.samples_seen += self._run.config.batch.global_

    def take_back(self) -> None:
        """The last step was spoiled on purpose: that says nothing of the loss scale."""
        if self._scaler is not None:
            scale, num_finite = self._scale_before
            self._scaler._scale.copy_(scale)
            self._scaler._growth_tracker.copy_(num_finite)

    def optimizer_state(self) -> OptimizerState:
        """To be saved, or to go on from."""
        tensors = optimizer_tensors(self._optimizer, self._names)
        return OptimizerState(tensors, self._scaler.state_dict() if self._scaler else {})

    def require_sound(self) -> None:
        """Proves that frozen weights and statistics have not moved, that trained ones are finite
        and that the ranks agree on both.

        Raises:
            RuntimeError: on every rank. RtlDistError: the weights are no numbers any more.
        """
        model, runtime = self._run.model, self._run.runtime
        moved = digest(frozen_tensors(model)) != self._frozen_digest
        if any(runtime.gather(moved)):
            raise RuntimeError(f"stage {self._stage.name}: a frozen weight or statistic moved")
        self._require_agreement()

    def _require_agreement(self) -> None:
        model, runtime = self._run.model, self._run.runtime
        trained, average = trainable_tensors(model), self._run.average
        if runtime.world_size > 1:  # hashing all weights takes a while
            runtime.require_equal("the weights", digest(model.state_dict()))
            if average:
                runtime.require_equal("the averaged weights", digest(average.model.state_dict()))
        if not all(bool(value.isfinite().all()) for value in trained.values()):
            raise RtlDistError(
                f"weights became infinite or not a number by step {self._run.state.step} (stage"
                f" {self._stage.name}); lower its lr or set optim.clip_grad_norm, and use another"
                f" run.dir; the last checkpoint here, of step {self._run.state.last_checkpoint}, is"
                " older"
            )

    def close(self) -> None:
        """Ends the workers and takes the wrapping off the model."""
        accelerator = self._run.runtime.accelerator
        self._statistics.close()
        self._batches.close()
        accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        accelerator.free_memory()

    def describe(self) -> str:
        """What the stage is about to do."""
        trained = sum(p.numel() for p in self._parameters)
        total = sum(p.numel() for p in self._run.model.parameters())
        how = ""
        if self.on_features:
            how = f", on cached features from below {self.boundary}"
        elif self.frozen is not None:
            how = f", all below {self.boundary} without autograd"
        most = "up to " if self._stage.until == "plateau" else ""
        return (
            f"{most}{self._num_steps} steps of {self._run.config.batch.global_} images, training"
            f" {trained:,} of {total:,} parameters{how}"
        )

    # --- building ------------------------------------------------------------------------------

    def _feature_maker(self) -> FeatureMaker | None:
        if self.frozen is None or self._stage.cache == "off":
            return None
        run = self._run
        return FeatureMaker(
            self.frozen,
            self.boundary,
            config=run.config,
            stage=self._stage,
            dataset=run.dataset,
            runtime=run.runtime,
            micro_batch_size=run.micro_batch_size,
            workers=run.workers,
        )

    def _wrap(self, kept: OptimizerState | None) -> None:
        """DDP around what is trained, and mixed precision; first tries whether compiling pays."""
        run, accelerator = self._run, self._run.runtime.accelerator
        state, compiles = run.state, run.config.compile
        if compiles == "auto" and run.config.batch.sync_batchnorm:
            state.is_compiled = False  # a trial of one rank's would wait for the others
        if compiles == "auto" and state.is_compiled is None:
            state.is_compiled = compiling_pays(
                self.trained,
                lambda: self._inputs_of(self._black_images(run.micro_batch_size)),
                num_images=self._num_steps * run.config.batch.global_,
                runtime=run.runtime,
                what=self._stage.name,
            )
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; its old name serves every version we support
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._wrapped, self._stepper = accelerator.prepare(
                self.trained,
                self._optimizer,
                device_placement=[True, False],  # restored state is where it belongs already
            )
        self._scaler = accelerator.scaler
        if kept is not None and kept.scaler and self._scaler is not None:
            self._scaler.load_state_dict(kept.scaler)

    def _compile(self) -> None:
        compiles = self._run.config.compile
        self.is_compiled = compiles is True or bool(
            compiles == "auto" and self._run.state.is_compiled
        )
        if self.is_compiled:
            self._wrapped = torch.compile(self._wrapped)
            if self.frozen is not None:
                self.frozen.compile()

    def _settle_gradient_buckets(self) -> None:
        """Passes something through that is forgotten.

        DDP puts gradients into other buckets after its first backward pass (torch's ``Reducer``,
        ``rebuild_buckets``), and where one lies says in which order three or more ranks' are added:
        a run's first step would round otherwise than the same step of one that did not start there.
        """
        self._statistics.begin()
        scores = self._wrapped(self._inputs_of(self._black_images(_STAND_IN_SIZE)))
        self._run.runtime.accelerator.backward(scores.sum())
        self._forget_step()

    # --- a step --------------------------------------------------------------------------------

    def _planned_factor(self, step_in_stage: int) -> float:
        return learning_rate_factor(
            step_in_stage, num_steps=self._num_steps, warmup=self._warmup, shape=self._shape
        )

    def _microbatch(self, microbatch: int, per_rank: int, *, last: bool) -> None:
        """Adds one microbatch's gradient. After a failure only the step's last one is passed
        through, in whose collectives the other ranks wait."""
        batch = self._next_batch() if self.failure is None else None
        if batch is not None:
            with self._compiling():
                self.failure = self._learn_from(batch, microbatch, per_rank, shares=last)
            self._run.runtime.heartbeat.beat(
                step=self._run.state.step, sample=functools.partial(self._name_last, batch)
            )
        if self.failure is not None and last:
            self._spoil()

    def _compiling(self) -> contextlib.AbstractContextManager[None]:
        """Around a step that may have to compile the network first, which takes minutes."""
        if not self.is_compiled or self._gradients_checked:
            return contextlib.nullcontext()
        return self._run.runtime.heartbeat.phase("compiling", open_ended=True)

    def _learn_from(
        self, batch: Batch, microbatch: int, per_rank: int, *, shares: bool
    ) -> OutOfMemory | None:
        """Forward and backward pass; returns the failure if the memory does not hold them.

        shares: gradients are shared among the ranks in the backward pass.
        """
        run = self._run
        self.bad += batch.bad
        if self.ledger:
            self.ledger.note(run.state.step, microbatch, batch)
        torch.manual_seed(
            derive_key(run.config.seed, _FORWARD_STREAM, run.state.step, microbatch) >> 1
        )
        # with SyncBatchNorm also the forward pass waits for the other ranks
        is_sharing = run.config.batch.sync_batchnorm and run.runtime.world_size > 1
        try:
            mixed, targets = self._mix(batch.inputs, batch.labels)
            scores = self._wrapped(self._inputs_of(mixed))
            losses = self._loss(scores, targets)
            loss = losses.sum() / (len(losses) * per_rank)
            is_sharing |= shares and run.runtime.world_size > 1
            run.runtime.heartbeat.beat()  # so that one that does not come this far is behind
            run.runtime.accelerator.backward(loss)
            is_sharing = False
            self._statistics.add()
            self.totals.add(losses.detach(), scores.detach(), batch.labels)
        except torch.OutOfMemoryError:
            pass  # handled below, when what the exception holds on to is free
        else:
            return None
        if is_sharing:  # part of it has gone to the others, the rest never will
            raise RtlDistError(
                f"out of memory in step {run.state.step}, while the ranks exchanged gradients;"
                f" start the same command again with batch.micro={run.micro_batch_size // 2}: it"
                " goes on from its last checkpoint"
            )
        return OutOfMemory(f"out of memory with microbatches of {run.micro_batch_size}")

    def _name_last(self, batch: Batch) -> str:
        if self._run.config.data.backend == "stream":
            return "of a stream"
        return self._run.train.name_of(int(batch.samples[-1]))

    def _spoil(self) -> None:
        """Makes the gradient of every parameter not a number, so that no rank takes this step."""
        self._stepper.zero_grad(set_to_none=True)
        if self._run.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        scores = self._wrapped(self._inputs_of(self._black_images(_STAND_IN_SIZE)))
        everything = scores.sum() + sum(p.sum() for p in self._parameters)
        self._run.runtime.accelerator.backward(everything * torch.nan)

    def _inputs_of(self, batch: torch.Tensor) -> torch.Tensor:
        """What goes into the trained part: images, or what the frozen part makes of them."""
        is_images = batch.dtype == torch.uint8 or not self.on_features
        if self.frozen is None or not is_images:
            return batch
        with self._run.runtime.accelerator.autocast():
            out: torch.Tensor = self.frozen(batch)
        return out

    def _black_images(self, count: int) -> torch.Tensor:
        """In place of those of a microbatch that cannot be had, or to try what one costs."""
        config, side = self._run.config, self._stage.image_size
        shape = (count, config.data.channels, side, side)
        return torch.zeros(shape, dtype=torch.uint8, device=self._run.runtime.device)

    def _next_batch(self) -> Batch | None:
        """The next microbatch; None if the loader failed."""
        asked_at = time.perf_counter()
        batch = None
        try:
            is_remote = self._run.train.is_remote  # fetching has an end of its own
            with self._run.runtime.heartbeat.phase("waiting for data", open_ended=is_remote):
                batch = next(self._batches.iterator)
        except RtlDistError as error:
            self.failure = error
        self.data_wait_s += time.perf_counter() - asked_at
        return batch

    def _take_step(self) -> torch.Tensor:
        """Steps the optimizer unless the gradient is not finite; returns whether it did, a bool on
        the device."""
        accelerator, limit = self._run.runtime.accelerator, self._run.config.optim.clip_grad_norm
        if self._scaler is not None:
            # on the device: state_dict would wait for it
            self._scale_before = self._scaler._scale.clone(), self._scaler._growth_tracker.clone()
            if limit is not None:
                accelerator.clip_grad_norm_(self._parameters, limit)
            return take_scaled_step(self._stepper, self._scaler)
        if limit is not None:
            norm = accelerator.clip_grad_norm_(self._parameters, limit)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters])
        taken = norm.isfinite()
        self._optimizer.found_inf = (~taken).to(torch.float32)
        self._stepper.step()
        return taken

    def _check_gradients(self) -> None:
        """A parameter that DDP or the compiler forgot would silently never learn."""
        without = parameters_without_gradient(self._run.model.named_parameters())
        if without:
            raise RuntimeError(f"stage {self._stage.name}: no gradient reached {without}")
        self._gradients_checked = True
