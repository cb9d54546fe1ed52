"""An exponential moving average of the weights, kept as a model of its own."""

from __future__ import annotations

import copy

import torch

from rtl_dist.model.classifier import Classifier


class Average:
    """``average = decay * average + (1 - decay) * weights`` after each step, of parameters and of
    BatchNorm's running statistics; counters are copied."""

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: Classifier) -> None:
        averaged, weights = [], []
        for mine, theirs in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if mine.is_floating_point():
                averaged.append(mine)
                weights.append(theirs)
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(averaged, weights, 1 - self._decay)
