"""BatchNorm running statistics that do not depend on the number of processes.

PyTorch moves the running statistics once a forward pass, so they depend on how many passes a
process makes of a global batch. Here each training layer's statistics are taken from every
microbatch of the step, averaged over all of them on all ranks, and folded in once a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.model.side_by_side import SideBySide


def learning_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers whose running statistics follow the data now, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    }


class StepStatistics:
    """Use once a stage: ``begin``; ``add`` after each microbatch; ``fold``.

    While in use a layer's momentum is 1, so a forward pass leaves exactly that microbatch's mean
    and unbiased variance in its buffers. Of the step's mean the statistics take ``momentum``, each
    layer's own if None.
    """

    def __init__(self, model: nn.Module, *, momentum: float | None = None) -> None:
        self._layers = list(learning_layers(model).values())
        self._momenta = [m.momentum for m in self._layers]
        # none is None in a layer that tracks its statistics, but their type allows for it
        both = [b for m in self._layers for b in (m.running_mean, m.running_var)]
        self._buffers = [b for b in both if b is not None]
        counts = [m.num_batches_tracked for m in self._layers]
        self._counts = [c for c in counts if c is not None]
        own = [0.1 if m is None else m for m in self._momenta]
        weights = own if momentum is None else [momentum] * len(self._layers)
        self._num_added = 0
        if self._layers:  # all of their buffers at once: hundreds of small ones cost a GPU's time
            self._before, self._sums = SideBySide(self._buffers), SideBySide(self._buffers)
            self._counts_before = SideBySide(self._counts)
            self._counts_after = SideBySide(self._counts)
            self._weights = torch.cat(
                [b.new_full((b.numel(),), weights[i // 2]) for i, b in enumerate(self._buffers)]
            )
        for layer in self._layers:
            layer.momentum = 1.0

    @torch.no_grad()
    def begin(self) -> None:
        if not self._layers:
            return
        self._before.take(self._buffers)
        self._counts_before.take(self._counts)
        self._sums.flat.zero_()
        self._num_added = 0

    @torch.no_grad()
    def add(self) -> None:
        if self._layers:
            torch._foreach_add_(self._sums.parts, self._buffers)
            self._num_added += 1

    @torch.no_grad()
    def fold(
        self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor], *, taken: torch.Tensor
    ) -> None:
        """Moves the running statistics towards this step's by each layer's own momentum.

        taken: a bool on the device. If the step is not taken the statistics are put back, or what
        overflowed would stay in them (pytorch #88474).
        """
        if not self._layers:
            return
        before = self._before.flat
        step = mean_over_ranks(self._sums.flat / max(1, self._num_added))
        torch.where(taken, before.lerp(step, self._weights), before, out=self._sums.flat)
        self._sums.give(self._buffers)
        torch.add(self._counts_before.flat, taken, out=self._counts_after.flat)
        self._counts_after.give(self._counts)

    def put_back(self) -> None:
        """As if this step had not begun."""
        if self._layers:
            self._before.give(self._buffers)
            self._counts_before.give(self._counts)

    def close(self) -> None:
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = momentum
