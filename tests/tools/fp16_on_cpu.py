"""fp16 with its loss scaler on a CPU, which the product refuses: slow there, and all the same."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from rtl_dist.distributed import runtime
from rtl_dist.training.stage_optimizer import StageOptimizer


def allow_fp16(monkeypatch: pytest.MonkeyPatch, **of_scaler: Any) -> None:
    """Runs of ``precision: fp16`` train, in float16 and with a loss scaler as on a GPU.

    of_scaler: arguments of its scaler.
    """

    class ScalingAccelerator(Accelerator):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            if self.mixed_precision == "fp16":
                self.native_amp = True
                self.scaler = torch.amp.GradScaler("cpu", **of_scaler)

    monkeypatch.setattr(runtime, "resolve_precision", lambda wanted, **_: wanted)
    monkeypatch.setattr(runtime, "Accelerator", ScalingAccelerator)


def watch_scale(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float]]:
    """Of each step of the runs to come: whether it was taken, and the loss scale after it."""
    seen: list[tuple[bool, float]] = []
    step = StageOptimizer.step

    def watched(self):
        taken = step(self)
        seen.append((bool(taken), self.state().scaler["scale"]))
        return taken

    monkeypatch.setattr(StageOptimizer, "step", watched)
    return seen
