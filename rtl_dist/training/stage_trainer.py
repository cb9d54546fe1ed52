"""One stage's optimizer steps: everything the stage needs is built afresh, then steps are taken."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass

import torch

from rtl_dist.config import ResolvedStage
from rtl_dist.core.device_memory import Attempt
from rtl_dist.core.errors import OutOfMemory, RtlDistError
from rtl_dist.core.keys import Stream, stream_key
from rtl_dist.data.loading.batch import Batch
from rtl_dist.features.maker import FeatureMaker
from rtl_dist.features.views import ViewPlanner
from rtl_dist.model.divided import FrozenPart
from rtl_dist.optim.counts import TrainTotals, add_counts
from rtl_dist.optim.losses import make_loss
from rtl_dist.optim.mixing import make_mixer
from rtl_dist.optim.skipped import SkippedSteps
from rtl_dist.records.ledger import Ledger
from rtl_dist.training.batches import StageReading, open_stage_batches
from rtl_dist.training.run import Run
from rtl_dist.training.stage_network import StageNetwork
from rtl_dist.training.stage_optimizer import OptimizerState, StageOptimizer
from rtl_dist.training.standardizing import standardize_head


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What this rank met in one step; it counts once all ranks have agreed that none failed."""

    bad: list[str]
    """The damaged samples that were met, as text."""
    failure: RtlDistError | None
    """Of the loader or the memory: the step was spoiled on purpose."""
    abandoned: bool
    """By all ranks, as one was asked to stop: nothing of the step is left."""
    taken: torch.Tensor
    """A bool on the device: whether the gradient was finite, so that the optimizer stepped."""
    data_wait_s: float
    """How long the loader was waited for."""


class StageTrainer:
    """Takes the steps of one stage.

    Attributes:
        network, optimizer: of the stage.
        features: of the frozen part, found or computed; None where there are none to have.
        totals: training counts since they were last folded. skipped: steps that were not taken.
        ledger: None unless ``run.ledger``.
    """

    def __init__(
        self,
        stage: ResolvedStage,
        run: Run,
        kept: OptimizerState | None = None,
        *,
        num_steps: int | None = None,
    ) -> None:
        """
        Args:
            kept: of an optimizer to go on with.
            num_steps: to read data for; None: what is left of the stage.
        """
        self._stage, self._run = stage, run
        config, runtime, state, dataset = run.config, run.runtime, run.state, run.dataset
        self.network = StageNetwork(stage, run)
        self.optimizer = StageOptimizer(self.network, stage, run, kept)
        self.features = self._feature_maker()
        left = state.stage_first_step + stage.num_steps - state.step
        self._reading = reading = StageReading(
            stage=stage,
            config=config,
            split=run.train,
            first_step=state.step,
            end_step=state.step + (left if num_steps is None else num_steps),
            micro_batch_size=run.micro_batch_size,
            runtime=runtime,
            workers=run.workers,
        )
        self._batches = open_stage_batches(
            reading, features=self.features, num_classes=dataset.num_classes
        )
        if state.is_cached is None:  # a run that goes on does as before, whatever it measures then
            state.is_cached = self._batches.are_features
        self._bad = list(self._batches.bad)
        self._failure: RtlDistError | None = None
        self._data_wait_s = 0.0
        self.network.wrap(on_features=self._batches.are_features)
        self.optimizer.prepare()
        self.network.settle()
        self._loss = make_loss(
            stage.optim,
            task=dataset.task,
            class_counts=run.train.class_counts,
            device=runtime.device,
        )
        self._mix = make_mixer(stage.augment, num_classes=dataset.num_classes)
        self.totals = TrainTotals(task=dataset.task, device=runtime.device)
        self.skipped = SkippedSteps(
            runtime.device, total=state.skipped_steps, in_a_row=state.skipped_in_a_row
        )
        self.ledger = Ledger(run.folder, runtime, state) if config.run.ledger else None

    def standardize_head(self) -> None:
        """Before the first step of a stage that trains the head alone: from here on it learns from
        standardised features. Called by all ranks; of no effect elsewhere, or a second time.

        Raises:
            OutOfMemory: on every rank, if the memory of one does not hold a microbatch.
            StopRequested, RtlDistError: see ``standardizing``.
        """
        run, reading = self._run, self._reading
        at_start = reading.first_step == run.state.stage_first_step < reading.end_step
        if self.network.is_head_alone and at_start and run.model.head.mean is None:
            standardize_head(run, self.network, reading, self._batches)

    def step(self, rate_factor: float | None = None) -> StepOutcome:
        """One optimizer step over this rank's microbatches of the global batch. If a rank is asked
        to stop meanwhile, it is given up between two microbatches.

        Args:
            rate_factor: of the learning rates; None: the schedule's.
        """
        run, network = self._run, self.network
        if rate_factor is None:
            step_in_stage = run.state.step - run.state.stage_first_step
            rate_factor = self.optimizer.planned_factor(step_in_stage)
        self.optimizer.set_rates(rate_factor)
        per_rank = run.config.batch.total // run.micro_batch_size // run.runtime.world_size
        network.statistics.begin()
        for i in range(per_rank):
            if per_rank > 1 and run.runtime.asked_to_stop():
                network.forget_step()
                not_taken = torch.zeros((), dtype=torch.bool, device=run.runtime.device)
                return self._outcome(not_taken, abandoned=True)
            last = i == per_rank - 1
            with contextlib.nullcontext() if last else network.without_sharing():
                self._microbatch(run.runtime.rank * per_rank + i, per_rank, last=last)
        if self._failure is None:
            network.check_gradients()
        taken = self.optimizer.step()
        network.clear_gradients()
        network.statistics.fold(run.runtime.mean_over_ranks, taken=taken)
        if run.average:
            run.average.update(run.model, taken=taken)
        self.optimizer.require_rates()
        return self._outcome(taken)

    def accept(self, outcome: StepOutcome) -> None:
        """Counts a step."""
        self.totals.accept()
        self.skipped.note(outcome.taken)
        self._run.state.step += 1
        self._run.state.samples_seen += self._run.config.batch.total

    def fold_totals(self) -> None:
        """Reads the device's counts into the run's state; a deliberate wait for it, at logging and
        saving only."""
        state = self._run.state
        counts = self.totals.flush(self._run.runtime.sum_over_ranks)
        state.skipped_steps, state.skipped_in_a_row = self.skipped.exact()
        state.since_log = add_counts(state.since_log, counts)
        state.since_eval = add_counts(state.since_eval, counts)

    def close(self) -> None:
        """Ends the workers and takes the wrapping off the model."""
        self._batches.close()
        self.network.close()
        self._run.runtime.accelerator.free_memory()

    def describe(self) -> str:
        """What the stage is about to do."""
        trained = sum(p.numel() for p in self.network.parameters)
        total = sum(p.numel() for p in self._run.model.parameters())
        if not self._stage.num_steps:  # it is solved
            return f"solving {trained:,} of {total:,} parameters, without steps"
        how = ""
        if self.network.on_features:
            how = f", on cached features from below {self.network.first_trained}"
        elif self.network.frozen is not None:
            how = f", all below {self.network.first_trained} without autograd"
        most = "up to " if self._stage.patience is not None else ""
        return (
            f"{most}{self._stage.num_steps} steps of {self._run.config.batch.total} images,"
            f" training {trained:,} of {total:,} parameters{how}"
        )

    def learn_from(
        self, batch: Batch, microbatch: int, per_rank: int, *, shares: bool
    ) -> OutOfMemory | None:
        """Forward and backward pass of one microbatch, by its number in the global batch; returns
        the failure if the memory does not hold them.

        Args:
            per_rank: how many microbatches of this step each rank has.
            shares: gradients are shared among the ranks in the backward pass.

        Raises:
            RtlDistError: the memory did not hold a backward pass that shares gradients.
        """
        run = self._run
        self._bad += batch.bad
        if self.ledger:
            self.ledger.note(run.state.step, microbatch, batch)
        torch.manual_seed(
            stream_key(run.config.seed, Stream.FORWARD, run.state.step, microbatch) >> 1
        )
        is_sharing, device = False, run.runtime.device
        with Attempt() as attempt:
            images, labels = batch.inputs.to(device), batch.labels.to(device)  # if they are not yet
            # with SyncBatchNorm also the forward pass waits for the other ranks
            is_sharing = run.config.batch.sync_batchnorm and run.runtime.world_size > 1
            mixed, targets = self._mix(images, labels)
            scores = self.network(mixed)
            losses = self._loss(scores, targets)
            loss = losses.sum() / (len(losses) * per_rank)
            is_sharing |= shares and run.runtime.world_size > 1
            run.runtime.heartbeat.beat()  # so that one that does not come this far is behind
            run.runtime.accelerator.backward(loss)
            is_sharing = False
            self.network.statistics.add()
            self.totals.add(losses.detach(), scores.detach(), labels)
        if not attempt.ran_out:
            return None
        if is_sharing:  # part of it has gone to the others, the rest never will
            cure = f"with batch.micro={run.micro_batch_size // 2}"
            if run.config.batch.sync_batchnorm:  # one microbatch a process is all it takes
                cure = "on more processes"
            raise RtlDistError(
                f"out of memory in step {run.state.step}, while the ranks exchanged gradients;"
                f" start the same command again {cure}: it goes on from its last checkpoint"
            )
        return OutOfMemory(f"out of memory with microbatches of {run.micro_batch_size}")

    def next_batch(self) -> Batch:
        """The next microbatch. Raises RtlDistError: the loader failed."""
        asked_at = time.perf_counter()
        is_remote = self._run.train.is_remote  # fetching has an end of its own
        try:
            with self._run.runtime.heartbeat.phase("waiting for data", open_ended=is_remote):
                return next(self._batches.iterator)
        finally:
            self._data_wait_s += time.perf_counter() - asked_at

    def _feature_maker(self) -> FeatureMaker | None:
        run, config, frozen = self._run, self._run.config, self.network.frozen
        uses_store = self._stage.cache != "off"
        if frozen is None or not (uses_store or self._stage.solve):
            return None
        assert isinstance(frozen, FrozenPart)
        planner = ViewPlanner(
            frozen,
            model_name=config.model.name,
            first_trained=self.network.first_trained,
            stage=self._stage,
            dataset=run.dataset,
            channels=config.data.channels,
            seed=config.seed,
            micro_batch_size=run.micro_batch_size,
            runtime=run.runtime,
        )
        return FeatureMaker(
            planner,
            config.features,
            runtime=run.runtime,
            workers=run.workers,
            uses_store=uses_store,
            decided=run.state.is_cached,
            time_training=self.network.time_training,
        )

    def _microbatch(self, microbatch: int, per_rank: int, *, last: bool) -> None:
        """Adds one microbatch's gradient. After a failure only the step's last one is passed
        through, in whose collectives the other ranks wait."""
        batch = None
        if self._failure is None:
            try:
                batch = self.next_batch()
            except RtlDistError as error:
                self._failure = error
        if batch is not None:
            with self.network.compiling():
                self._failure = self.learn_from(batch, microbatch, per_rank, shares=last)
            self._run.runtime.heartbeat.beat(
                step=self._run.state.step, sample=functools.partial(self._name_last, batch)
            )
        if self._failure is not None and last:
            self._spoil()

    def _name_last(self, batch: Batch) -> str:
        if self._run.config.data.backend == "stream":
            return "of a stream"
        return self._run.train.name_of(int(batch.samples[-1]))

    def _spoil(self) -> None:
        """Makes the gradient of every parameter not a number, so that no rank takes this step."""
        self.network.clear_gradients()
        if self._run.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        everything = self.network.stand_in_scores().sum()
        everything = everything + sum(p.sum() for p in self.network.parameters)
        self._run.runtime.accelerator.backward(everything * torch.nan)

    def _outcome(self, taken: torch.Tensor, *, abandoned: bool = False) -> StepOutcome:
        outcome = StepOutcome(
            bad=self._bad,
            failure=self._failure,
            abandoned=abandoned,
            taken=taken,
            data_wait_s=self._data_wait_s,
        )
        self._bad, self._failure, self._data_wait_s = [], None, 0.0
        return outcome
