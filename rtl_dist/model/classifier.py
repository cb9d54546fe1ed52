"""The one shape every network takes here: a trunk that yields features, and a linear head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rtl_dist.model.head import Head


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pixels become the network's input; travels with the weights."""

    image_size: int
    """Side of the square that is evaluated, in pixels."""
    crop_pct: float
    """The short side is resized to image_size / crop_pct before the centre is cut out."""
    mean: tuple[float, ...]
    """Of values in 0 to 1, one a channel; subtracted first."""
    std: tuple[float, ...]
    """Of values in 0 to 1, one a channel; divided by then."""

    @property
    def channels(self) -> int:
        return len(self.mean)


class Classifier(nn.Module):
    """Images to class scores: normalise, ``trunk``, ``head``.

    Splitting the head off lets a frozen trunk run without autograd and its features be cached.
    ``native_state_dict`` has the names of the timm or torchvision model the trunk was made from.
    """

    mean: torch.Tensor
    std: torch.Tensor
    shows_layers = True
    """Whether it has a trunk and a head that can be looked at: not so of an exported file."""

    def __init__(
        self,
        trunk: nn.Module,
        head: Head,
        *,
        native_head: str,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.native_head = native_head
        self.preprocessing = preprocessing
        shape = (1, preprocessing.channels, 1, 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(shape), persistent=False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, C, S, S) on the model's device to (n, F)."""
        pixels = images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        out: torch.Tensor = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        return out

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """(n, F) to scores (logits) (n, num_classes)."""
        scores: torch.Tensor = self.head(features)
        return scores

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(images))

    def native_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the names of the original timm or torchvision model."""
        state = {key: value.detach() for key, value in self.trunk.state_dict().items()}
        for key, value in self.head.plain_state().items():
            state[f"{self.native_head}.{key}"] = value
        return state


def place(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a network to a device, its weights in that dtype and in channels-last memory."""
    # torch takes the three together, but its types do not say so
    model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
