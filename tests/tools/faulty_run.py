"""A step whose gradient is no number, or for which there is not enough memory, in this process or,
as ``Injected``, in a run of ``killed_runs``. Whichever rank has the microbatch meets it.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from killed_runs import Fault

from rtl_dist.training.stage_trainer import StageTrainer

learn_from = StageTrainer.learn_from


def say() -> None:
    sys.stdout.write("fault fired\n")
    sys.stdout.flush()


@dataclass(frozen=True, kw_only=True)
class Injected(Fault):
    """``inject``, in one rank."""

    kind: str
    step: int
    microbatch: int

    def install(self, mark: int) -> None:
        inject(self.kind, self.step, self.microbatch, tell=lambda: os.write(mark, b"fired"))


def inject(kind: str, step: int, microbatch: int, *, tell: Callable[[], object] = say) -> None:
    """Makes that microbatch's gradient no number (``nan``), or its memory too small in the forward
    pass (``oom``) or in the backward pass (``oom-backward``), once; then calls ``tell``."""
    fired: list[bool] = []

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    def learn(self, batch, number, per_rank, *, shares):
        state = self._run.state
        was_halved = state.micro_batch_size is not None  # another rank may have the number then
        if fired or was_halved or (state.step, number) != (step, microbatch):
            return learn_from(self, batch, number, per_rank, shares=shares)
        fired.append(True)
        tell()
        loss, accelerator = self._loss, self._run.runtime.accelerator
        backward = accelerator.backward
        if kind == "nan":
            self._loss = lambda scores, labels: loss(scores, labels) * torch.nan
        elif kind == "oom":
            self._loss = fail
        else:
            accelerator.backward = fail
        try:
            return learn_from(self, batch, number, per_rank, shares=shares)
        finally:
            self._loss = loss
            accelerator.backward = backward

    StageTrainer.learn_from = learn
