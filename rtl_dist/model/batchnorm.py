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
        self._weights = [w for w in weights for _ in range(2)]
        self._before: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._counts_before: list[torch.Tensor] = []
        self._num_added = 0
        for layer in self._layers:
            layer.momentum = 1.0

    def begin(self) -> None:
        self._before = [b.clone() for b in self._buffers]
        self._counts_before = [c.clone() for c in self._counts]
        self._sums = [torch.zeros_like(b) for b in self._buffers]
        self._num_added = 0

    def add(self) -> None:
        if self._buffers:
            torch._foreach_add_(self._sums, self._buffers)
            self._num_added += 1

    def fold(
        self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor], *, taken: torch.Tensor
    ) -> None:
        """Moves the running statistics towards this step's by each layer's own momentum.

        taken: a bool on the device. If the step is not taken the statistics are put back, or what
        overflowed would stay in them (pytorch #88474).
        """
        if not self._buffers:
            return
        flat = torch.cat([s.reshape(-1) for s in self._sums]) / max(1, self._num_added)
        flat = mean_over_ranks(flat)
        step = flat.split([b.numel() for b in self._buffers])
        for buffer, before, now, weight in zip(
            self._buffers, self._before, step, self._weights, strict=True
        ):
            moved = before.lerp(now.view_as(before), weight)
            buffer.copy_(torch.where(taken, moved, before))
        for count, before in zip(self._counts, self._counts_before, strict=True):
            count.copy_(before + taken)

    def put_back(self) -> None:
        """As if this step had not begun."""
        for buffer, before in zip(
            self._buffers + self._counts, self._before + self._counts_before, strict=True
        ):
            buffer.copy_(before)

    def close(self) -> None:
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = momentum
