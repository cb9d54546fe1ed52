"""A run with a fault in it: ``python faulty_run.py FAULT --config ...``; says ``fault fired``.

FAULT is ``kind:step:microbatch``; whichever rank has that microbatch of that step meets it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from rtl_dist.stage_trainer import StageTrainer
from rtl_dist.train import main

learn_from = StageTrainer._learn_from


def inject(kind: str, step: int, microbatch: int) -> None:
    """Makes that microbatch's gradient no number (``nan``), or its memory too small in the forward
    pass (``oom``) or in the backward pass (``oom-backward``), once."""
    fired: list[bool] = []

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    def learn(self, batch, number, per_rank, *, shares):
        state = self._job.state
        was_halved = state.micro_batch_size is not None  # another rank may have the number then
        if fired or was_halved or (state.step, number) != (step, microbatch):
            return learn_from(self, batch, number, per_rank, shares=shares)
        fired.append(True)
        sys.stdout.write("fault fired\n")
        sys.stdout.flush()
        loss, accelerator = self._loss, self._job.runtime.accelerator
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

    StageTrainer._learn_from = learn


if __name__ == "__main__":
    kind, step, microbatch = sys.argv[1].split(":")
    inject(kind, int(step), int(microbatch))
    sys.exit(main(sys.argv[2:]))
