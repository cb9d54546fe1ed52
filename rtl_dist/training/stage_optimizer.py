"""A stage's optimizer: rates, loss scale, a step taken or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


@dataclass(frozen=True)
class OptimizerState:
    """tensors: as ``optimizer_tensors`` has them. scaler: the loss scaler's (fp16 only)."""

    tensors: dict[str, torch.Tensor]
    scaler: dict[str, Any]

    def on_host(self) -> OptimizerState:
        return OptimizerState({k: v.cpu() for k, v in self.tensors.items()}, self.scaler)


def take_scaled_step(stepper: AcceleratedOptimizer, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Steps the optimizer; a bool on the device: False if the loss scaler skipped the step because
    of an overflow.

    Accelerate's ``optimizer_step_was_skipped`` is always False with a fused optimizer, which
    handles the overflow within its own step; a scale that fell says it in either case. The scale is
    compared on the device: ``get_scale`` would wait for it.
    """
    before = scaler._get_scale_async().clone()
    stepper.step()
    taken: torch.Tensor = scaler._get_scale_async() >= before
    return taken.reshape(())
