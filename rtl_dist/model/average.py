"""An exponential moving average of the weights, kept as a model of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from rtl_dist.core.device_memory import Attempt
from rtl_dist.core.errors import OutOfMemory
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.model.batchnorm import StepStatistics
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.side_by_side import SideBySide


class Average:
    """``average = decay * average + (1 - decay) * weights`` after each step, of parameters and of
    BatchNorm's running statistics; counters are copied."""

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: Classifier, *, taken: torch.Tensor) -> None:
        """taken: a bool on the device; without effect if the step was not taken."""
        mine, theirs = (list(m.state_dict().values()) for m in (self.model, model))
        for dtype in dict.fromkeys(value.dtype for value in mine):
            averaged = [value for value in mine if value.dtype == dtype]
            weights = [value for value in theirs if value.dtype == dtype]
            before, moved = SideBySide(averaged), SideBySide(averaged)
            old, new = before.take(averaged), moved.take(weights)
            if dtype.is_floating_point:
                new.sub_(old).mul_(1 - self._decay).add_(old)
            # chosen, not multiplied by 0: what overflowed times 0 is not 0
            torch.where(taken, new, old, out=new)
            moved.give(averaged)

    @contextmanager
    def with_statistics_of(
        self,
        batches: Iterable[torch.Tensor],
        rounds: int,
        layers: set[str],
        runtime: Runtime,
    ) -> Iterator[None]:
        """Within the block the BatchNorm layers named have the statistics that the averaged weights
        really meet (Izmailov et al. 2018, arXiv 1803.05407, section 3.2), in place of an average of
        those that other weights met.

        Args:
            batches: uint8 images (n, C, S, S), ``rounds`` of them on every rank.

        Raises:
            StopRequested: on every rank. RtlDistError: on every rank, if the loader of one failed.
            OutOfMemory: on every rank, if the memory of one does not hold a microbatch.
        """
        chosen = [m for name, m in self.model.named_modules() if name in layers]
        for layer in chosen:
            layer.train()
        statistics = StepStatistics(self.model, momentum=1.0)
        statistics.begin()
        try:
            passes = self._passes(batches, statistics, runtime)
            for _ in runtime.in_rounds(passes, rounds, what="measuring statistics"):
                pass
            true = torch.ones((), dtype=torch.bool, device=runtime.device)
            statistics.fold(runtime.mean_over_ranks, taken=true)
            self.model.eval()
            yield
        finally:
            self.model.eval()
            statistics.put_back()
            statistics.close()

    def _passes(
        self, batches: Iterable[torch.Tensor], statistics: StepStatistics, runtime: Runtime
    ) -> Iterator[None]:
        """Adds the statistics of one batch after the other."""
        for images in batches:
            with Attempt() as attempt, torch.no_grad(), runtime.accelerator.autocast():
                self.model(images.to(runtime.device))
            if attempt.ran_out:
                raise OutOfMemory(
                    f"out of memory measuring BatchNorm's statistics, with microbatches of"
                    f" {len(images)}"
                )
            statistics.add()
            yield
