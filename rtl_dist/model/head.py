"""The linear head, which can be trained on standardised features without its user noticing.

Features of a ReLU network are all positive, with means several times their spread: a badly
conditioned problem, which a first-order optimizer leaves unsolved (LeCun et al. 1998, Efficient
BackProp, section 4.3). While a stage trains the head alone, the head therefore subtracts their mean
and divides by their spread first; outside of training, and once the stage is over, both are folded
into the weights, and it is a plain linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Head(nn.Linear):
    """Features (n, F) to scores (n, C): standardised while training, dropout, linear.

    Attributes:
        mean: float (F,), what training subtracts from features; None where they are used as they
            are. In the state dict only while there is such, as is ``scale``.
        scale: float (), what training divides them by then.
    """

    mean: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(self, num_features: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__(num_features, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean", None)
        self.register_buffer("scale", None)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.mean is None or self.scale is None:
            return super().forward(self.dropout(features))
        if not self.training:  # as the weights will be used by whoever loads them
            folded = self.plain_state()
            return F.linear(features, folded["weight"], folded["bias"])
        standardized = ((features - self.mean) / self.scale).to(features.dtype)
        return super().forward(self.dropout(standardized))

    @torch.no_grad()
    def standardize(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """From now on trains on ``(features - mean) / scale``; its scores stay what they were.

        Args:
            mean: float (F,), of the features.
            scale: float (), positive.
        """
        self.fold()
        mean, scale = (v.to(self.weight.device, torch.float64) for v in (mean, scale))
        weight, bias = self.weight.double(), self.bias.double()
        self.bias.copy_(bias + weight @ mean)
        self.weight.copy_(weight * scale)
        self.mean, self.scale = (value.to(self.weight, copy=True) for value in (mean, scale))

    @torch.no_grad()
    def take(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Has from now on the scores of a plain linear layer; goes on standardising if it did.

        Args:
            weight, bias: float (C, F) and (C,).
        """
        mean, scale = self.mean, self.scale
        self.mean = self.scale = None
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if mean is not None and scale is not None:
            self.standardize(mean, scale)

    @torch.no_grad()
    def fold(self) -> None:
        """Becomes a plain linear layer with the same scores."""
        plain = self.plain_state()
        self.weight.copy_(plain["weight"])
        self.bias.copy_(plain["bias"])
        self.mean = self.scale = None

    def plain_state(self) -> dict[str, torch.Tensor]:
        """``weight`` (C, F) and ``bias`` (C,) of the plain linear layer with the same scores."""
        return folded_state({name: value.detach() for name, value in self.state_dict().items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        is_plain = prefix + "mean" not in state_dict
        self.mean = None if is_plain else torch.empty_like(self.weight[0])
        self.scale = None if is_plain else torch.empty_like(self.weight[0, 0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def folded_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A head's state dict as a plain linear layer's with the same scores; exact where it is one."""
    if "mean" not in state:
        return state
    # in float64: features' means are several times their spread, so the two terms nearly cancel
    weight = state["weight"].double() / state["scale"].double()
    bias = state["bias"].double() - weight @ state["mean"].double()
    return {"weight": weight.to(state["weight"].dtype), "bias": bias.to(state["bias"].dtype)}
