"""A stage's optimizer: its rates, its loss scale, and a step that is taken or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from rtl_dist.config import ResolvedStage
from rtl_dist.optim.named_state import optimizer_tensors, restore_optimizer
from rtl_dist.optim.optimizer import build_optimizer, require_learning_rates, set_learning_rates
from rtl_dist.optim.schedule import stage_rate_factor
from rtl_dist.training.run import Run
from rtl_dist.training.stage_network import StageNetwork

FIRST_SCALE = 2.0**16  # of the loss in fp16, as torch's GradScaler begins
# A head on cached features takes thousands of steps in which nothing overflows, and each 2,000
# double the scale. From here the first that does would be skipped fewer times than skip_limit.
MOST_SCALE = 2.0**24


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer knows: saved in checkpoints, or to go on from with another one."""

    tensors: dict[str, torch.Tensor]
    """By name, as ``optimizer_tensors`` has them."""
    scaler: dict[str, Any]
    """The loss scaler's state (fp16 only)."""

    def on_host(self) -> OptimizerState:
        return OptimizerState({k: v.cpu() for k, v in self.tensors.items()}, self.scaler)


class StageOptimizer:
    """The optimizer of what a stage trains. ``rates``: of its last step, by metric name."""

    def __init__(
        self,
        network: StageNetwork,
        stage: ResolvedStage,
        run: Run,
        kept: OptimizerState | None,
    ) -> None:
        """
        Args:
            kept: of an optimizer to go on with.
        """
        self._network, self._stage, self._run, self._kept = network, stage, run, kept
        self._optimizer = build_optimizer(run.model, stage, stage.optim, lr=stage.lr)
        if kept is not None and kept.tensors:
            restore_optimizer(self._optimizer, network.names, kept.tensors)
        done = run.state.step - run.state.stage_first_step
        self._factor = self.planned_factor(max(0, done - 1))
        self.rates = set_learning_rates(self._optimizer, self._factor)

    def prepare(self) -> None:
        """Makes steps follow the mixed precision; call after the network was wrapped."""
        accelerator = self._run.runtime.accelerator
        # restored state is where it belongs already
        self._stepper = accelerator.prepare_optimizer(self._optimizer, device_placement=False)
        self._scaler = accelerator.scaler
        if self._scaler is not None:
            if self._kept is not None and self._kept.scaler:
                self._scaler.load_state_dict(self._kept.scaler)
            else:
                begin_scale(self._scaler)
        self._kept = None

    @property
    def scales_loss(self) -> bool:
        """In fp16: a step that is skipped may only say that the scale has yet to be found."""
        return self._scaler is not None

    def planned_factor(self, step_in_stage: int) -> float:
        """What the schedule multiplies all rates by at a step of the stage, counted from 0."""
        return stage_rate_factor(
            self._stage,
            step_in_stage,
            lr=self._stage.lr,
            times_lowered=self._run.state.times_lowered,
        )

    def set_rates(self, factor: float) -> None:
        """The rates of the step to come: each group's own, times ``factor``."""
        self._factor = factor
        self.rates = set_learning_rates(self._optimizer, factor)

    def require_rates(self) -> None:
        """Raises RuntimeError: a rate is not what ``set_rates`` made it."""
        require_learning_rates(self._optimizer, self._factor)

    def step(self) -> torch.Tensor:
        """Steps unless the gradient is not finite; returns whether it did, a bool on the device."""
        accelerator, limit = self._run.runtime.accelerator, self._stage.optim.clip_grad_norm
        parameters = self._network.parameters
        if self._scaler is not None:
            # on the device: state_dict would wait for it
            self._scale_before = self._scaler._scale.clone(), self._scaler._growth_tracker.clone()
            if limit is not None:
                accelerator.clip_grad_norm_(parameters, limit)
            taken = take_scaled_step(self._stepper, self._scaler)
            self._scaler._scale.clamp_(max=MOST_SCALE)
            return taken
        if limit is not None:
            norm = accelerator.clip_grad_norm_(parameters, limit)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        taken = norm.isfinite()
        # fused optimizers look for this by name (torch 2.11)
        self._optimizer.found_inf = (~taken).to(torch.float32)  # type: ignore[attr-defined]
        self._stepper.step()
        return taken

    def take_back(self) -> None:
        """The last step was spoiled on purpose: that says nothing of the loss scale."""
        if self._scaler is not None:
            scale, num_finite = self._scale_before
            self._scaler._scale.copy_(scale)
            self._scaler._growth_tracker.copy_(num_finite)

    def state(self) -> OptimizerState:
        tensors = optimizer_tensors(self._optimizer, self._network.names)
        return OptimizerState(tensors, self._scaler.state_dict() if self._scaler else {})


def begin_scale(scaler: torch.amp.GradScaler) -> None:
    """Of a stage, whose gradients are of another size than those of the stage before (there is one
    scaler for all): what the scale was brought down to holds on, what it grew to does not."""
    known = scaler.state_dict()
    first = {"scale": min(known["scale"], FIRST_SCALE), "_growth_tracker": 0}
    scaler.load_state_dict(known | first)


def take_scaled_step(stepper: AcceleratedOptimizer, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Steps the optimizer; a bool on the device: False if the loss scaler skipped the step because
    of an overflow.

    Accelerate's ``optimizer_step_was_skipped`` is always False with a fused optimizer, which
    handles the overflow within its own step; a scale that fell says it in either case. The scale is
    compared on the device: ``get_scale`` would wait for it.
    """
    scale = scaler._get_scale_async()
    assert scale is not None  # a backward pass has made it
    before = scale.clone()
    stepper.step()
    after = scaler._get_scale_async()
    assert after is not None
    return (after >= before).reshape(())
