"""The network of one stage: what is frozen below what is trained, wrapped, and proofs of both."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

from rtl_dist.config import ResolvedStage
from rtl_dist.core.errors import RtlDistError
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
from rtl_dist.training.compilation import compiling_pays, time_passes
from rtl_dist.training.run import Run

_STAND_IN_SIZE = 2  # images


class StageNetwork:
    """The model of a run, frozen and cut for a stage; ``wrap`` and ``settle`` make it ready.

    Attributes:
        first_trained: the name of the first trained part.
        frozen, trained: the model, cut below that part; frozen is None where nothing lies below.
        parameters: those that are trained. names: of all parameters, by their ``id``.
        statistics: of the BatchNorm layers that learn, one step at a time.
        on_features: what comes in is what the frozen part made of images, not images.
        is_compiled: by torch.compile.
    """

    def __init__(self, stage: ResolvedStage, run: Run) -> None:
        self._stage, self._run, model = stage, run, run.model
        freeze_for(model, stage)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.first_trained = first_trainable_part(model, stage)
        divided = divide(model, self.first_trained, dtype=run.runtime.autocast_dtype)
        self.frozen, self.trained = divided.frozen, divided.trained
        self.on_features = self.is_compiled = False
        self._gradients_checked = False

    @property
    def is_head_alone(self) -> bool:
        """Only the head learns, from features that stay as they are."""
        return self.frozen is not None and self.first_trained == "head"

    def time_training(self, features: torch.Tensor) -> float:
        """Seconds of a forward and a backward pass of the trained part on this rank, of what the
        frozen part made of a microbatch; on a copy, before ``wrap``."""
        if self._run.config.batch.sync_batchnorm:
            return 0.0  # one rank's would wait for the others
        return time_passes(copy.deepcopy(self.trained), features, self._run.runtime)

    def wrap(self, *, on_features: bool) -> None:
        """DDP around what is trained, and mixed precision; first tries whether compiling pays."""
        self.on_features = on_features
        run, state, compiles = self._run, self._run.state, self._run.config.compile
        if compiles == "auto" and run.config.batch.sync_batchnorm:
            state.is_compiled = False  # a trial of one rank's would wait for the others
        if compiles == "auto" and state.is_compiled is None:
            state.is_compiled = compiling_pays(
                self.trained,
                lambda: self.inputs_of(self._black_images(run.micro_batch_size)),
                num_images=self._stage.num_steps * run.config.batch.total,
                runtime=run.runtime,
                what=self._stage.name,
            )
        self._wrapped: Callable[..., Any] = run.runtime.wrap(self.trained)
        self.statistics = StepStatistics(run.model)  # once wrapped: that puts in other buffers

    def settle(self) -> None:
        """Makes a run's first step round like any other, then compiles; call after the optimizer
        was prepared, whose loss scale a backward pass needs."""
        if self._run.runtime.world_size > 1:
            self._settle_gradient_buckets()
        compiles = self._run.config.compile
        self.is_compiled = compiles is True or bool(
            compiles == "auto" and self._run.state.is_compiled
        )
        # not in place: features and evaluations, of other shapes, would have it begin again, and
        # features that round otherwise would be kept under the same key
        self._trained_pass: Callable[..., Any] = self._wrapped
        self._frozen_pass: Callable[..., Any] | None = self.frozen
        if self.is_compiled:
            self._trained_pass = torch.compile(self._wrapped)
            if self.frozen is not None:
                self._frozen_pass = torch.compile(self.frozen)
        self._frozen_digest = digest(frozen_tensors(self._run.model))
        self._run.runtime.require_equal("the frozen weights", self._frozen_digest)
        self._require_agreement()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Scores, (n, num_classes), of images or of features of the frozen part."""
        scores: torch.Tensor = self._trained_pass(self._below(self._frozen_pass, inputs))
        return scores

    def inputs_of(self, batch: torch.Tensor) -> torch.Tensor:
        """What goes into the trained part: images, or what the frozen part makes of them."""
        return self._below(self.frozen, batch)

    def _below(self, frozen: Callable[..., Any] | None, batch: torch.Tensor) -> torch.Tensor:
        is_images = batch.dtype == torch.uint8 or not self.on_features
        if frozen is None or not is_images:
            return batch
        with self._run.runtime.accelerator.autocast():
            out: torch.Tensor = frozen(batch)
        return out

    def stand_in_scores(self) -> torch.Tensor:
        """Scores of black images, in place of those of a microbatch that cannot be had; never
        compiled, which the other ranks would wait for."""
        scores: torch.Tensor = self._wrapped(self.inputs_of(self._black_images(_STAND_IN_SIZE)))
        return scores

    def without_sharing(self) -> contextlib.AbstractContextManager[None]:
        """Within the block gradients add up on this rank; they are shared in the next backward
        pass outside of one."""
        context: contextlib.AbstractContextManager[None] = self._run.runtime.accelerator.no_sync(
            self._wrapped
        )
        return context

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Around a step that may have to compile the network first, which takes minutes."""
        if not self.is_compiled or self._gradients_checked:
            return contextlib.nullcontext()
        return self._run.runtime.heartbeat.phase("compiling", open_ended=True)

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def forget_step(self) -> None:
        """As if the step under way had not begun."""
        self.clear_gradients()
        self.statistics.put_back()

    def check_gradients(self) -> None:
        """A parameter that DDP or the compiler forgot would silently never learn; looked at once.

        Raises:
            RuntimeError: a trained parameter has no gradient.
        """
        if self._gradients_checked:
            return
        without = parameters_without_gradient(self._run.model.named_parameters())
        if without:
            raise RuntimeError(f"stage {self._stage.name}: no gradient reached {without}")
        self._gradients_checked = True

    def require_sound(self) -> None:
        """Proves that frozen weights and statistics have not moved, that trained ones are finite
        and that the ranks agree on both.

        Raises:
            RuntimeError: on every rank. RtlDistError: the weights are no numbers any more.
        """
        moved = digest(frozen_tensors(self._run.model)) != self._frozen_digest
        if any(self._run.runtime.gather(moved)):
            raise RuntimeError(f"stage {self._stage.name}: a frozen weight or statistic moved")
        self._require_agreement()

    def close(self) -> None:
        """Takes the wrapping off the model."""
        self.statistics.close()
        self._run.runtime.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        # what it was marked with: another stage that trains the same would get it back as it is,
        # in float32 (accelerate 1.15)
        vars(self.trained).pop("_is_accelerate_prepared", None)
        if self.is_compiled:
            # what is compiled is kept by the code of forward, which stages share: after eight of
            # them (torch's recompile_limit) nothing would be compiled any more
            torch.compiler.reset()

    def _require_agreement(self) -> None:
        model, runtime, average = self._run.model, self._run.runtime, self._run.average
        if runtime.world_size > 1:  # hashing all weights takes a while
            runtime.require_equal("the weights", digest(model.state_dict()))
            if average:
                runtime.require_equal("the averaged weights", digest(average.model.state_dict()))
        if not all(bool(value.isfinite().all()) for value in trainable_tensors(model).values()):
            raise RtlDistError(
                f"weights became infinite or not a number by step {self._run.state.step} (stage"
                f" {self._stage.name}); lower its lr or set optim.clip_grad_norm, and use another"
                f" run.dir; the last checkpoint here, of step {self._run.state.last_checkpoint}, is"
                " older"
            )

    def _settle_gradient_buckets(self) -> None:
        """Passes something through that is forgotten.

        DDP puts gradients into other buckets after its first backward pass (torch's ``Reducer``,
        ``rebuild_buckets``), and where one lies says in which order three or more ranks' are added:
        a run's first step would round otherwise than the same step of one that did not start there.
        """
        self.statistics.begin()
        with warnings.catch_warnings():
            # said once a process, of 1 x 1 convolutions in channels_last: their strides are written
            # in two ways that mean the same (pytorch #47163, #157862)
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self._run.runtime.accelerator.backward(self.stand_in_scores().sum())
        self.forget_step()

    def _black_images(self, count: int) -> torch.Tensor:
        side = self._stage.image_size
        shape = (count, self._run.config.data.channels, side, side)
        return torch.zeros(shape, dtype=torch.uint8, device=self._run.runtime.device)
