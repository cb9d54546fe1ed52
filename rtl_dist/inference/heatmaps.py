"""Where a class's score comes from: class activation maps, of any network.

The map is the gradient of the score times the activations that it is taken at, summed over the
channels, at the last layer that still has places (HiResCAM, Draelos and Carin 2020, arXiv
2011.08891, with that layer found by itself). Behind it a network that averages over the places and
ends in a linear head is linear, and there this is the class activation map of Zhou et al. (2016,
arXiv 1512.04150), exactly: its mean plus the head's bias is the score. So it is where what lies
behind only scales with its input, as max pooling and ReLU do. Where it does otherwise (a norm
behind the pooling, as in ConvNeXt and Swin; the attention to a class token, as in ViT) the map
still shows where the score reacts, but its mean is not the score. Which it was is measured, image
by image, and said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rtl_dist.core.errors import UserError
from rtl_dist.model.classifier import Classifier

_AT_ONCE = 16  # images, whose activations are kept for the way back
_DEPTH = 3  # of the layers looked at, below the trunk: of a block's own only the first ones
_MOST_TOKENS_BESIDE = 8  # class and register tokens, beside those of places
_ROUNDING = 1e-3  # of the score and of what it is the sum of


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmaps:
    """Of N images, one map each, of the class that was asked for."""

    maps: np.ndarray
    """float32 (N, h, w): what each place of the square that the network saw gave to the score;
    above 0 it speaks for the class, below 0 against it. Rows and columns are those of ``layer``:
    7 x 7 of 224 x 224 pixels, in a ResNet."""
    scores: np.ndarray
    """float32 (N,): the class's scores (logits), as they were computed here, without autocast."""
    exact: np.ndarray
    """bool (N,): whether the map's mean plus the head's bias is the score, to rounding."""
    layer: str
    """The path of the trunk's layer that the maps are of."""

    @property
    def spread(self) -> np.ndarray:
        """float32 (N, h, w): the maps with what is of no place, the bias, spread evenly over all:
        their mean is the score. Where the map is exact, each value is the score of a picture that
        is everywhere as at that place.

        This is what to look at: activations are positive, so that a map alone may speak for a class
        everywhere, and the bias take as much back."""
        rest = self.scores - self.maps.mean((1, 2))
        whole: np.ndarray = self.maps + rest[:, None, None]
        return whole


def heatmaps(
    model: Classifier,
    images: torch.Tensor,
    classes: Sequence[int],
    *,
    against_others: bool = False,
) -> Heatmaps:
    """The map of one class for each of N images; the model is left in eval mode.

    Args:
        model: on any device; it is computed in its weights' own precision, without autocast.
        images: uint8 (N, C, S, S), as ``EvalTransform`` makes them; at least one.
        classes: N numbers of classes.
        against_others: of the class's score less the mean of all classes', bias likewise: what a
            softmax looks at, to which a place that speaks for all classes alike says nothing.

    Raises:
        UserError: no layer of this network has places.
    """
    if len(images) != len(classes) or not len(images):
        raise ValueError(f"{len(images)} images and {len(classes)} classes")
    if not model.shows_layers:
        raise UserError("an exported file gives no heatmaps: take the model that it was made of")
    model.eval()
    device = model.mean.device
    wanted = torch.as_tensor(list(classes), device=device)
    with torch.inference_mode(False), torch.enable_grad():
        layer = _last_layer_with_places(model, images[:1].to(device), wanted[:1])
        parts = [
            _maps(model, layer, images[rows].to(device), wanted[rows], against_others)
            for rows in (slice(i, i + _AT_ONCE) for i in range(0, len(images), _AT_ONCE))
        ]
    maps, scores, exact = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Heatmaps(maps=maps, scores=scores, exact=exact, layer=layer)


def _maps(
    model: Classifier,
    layer: str,
    images: torch.Tensor,
    classes: torch.Tensor,
    against_others: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps, scores and exactness (see ``Heatmaps``) of a few images."""
    logits, outputs = _logits(model, images, {layer: model.trunk.get_submodule(layer)})
    of_class, bias = _of_class(logits, classes), model.head.plain_state()["bias"].double()
    scores = of_class - logits.mean(1) if against_others else of_class
    bias = bias[classes] - (bias.mean() if against_others else 0.0)
    (gradient,) = torch.autograd.grad(scores.sum(), outputs[layer])
    gave = _by_place(gradient.double() * outputs[layer].detach().double())
    assert gave is not None
    maps = gave.sum(3) * (gave.shape[1] * gave.shape[2])  # so that their mean is the score
    scores = scores.detach().double()
    slack = _ROUNDING * (scores.abs() + gave.abs().sum((1, 2, 3))) + 1e-9
    exact = (maps.mean((1, 2)) + bias - scores).abs() <= slack
    return maps.float().cpu().numpy(), scores.float().cpu().numpy(), exact.cpu().numpy()


def _last_layer_with_places(model: Classifier, image: torch.Tensor, label: torch.Tensor) -> str:
    """The path of the trunk's last layer whose output has places of which more than one counts:
    behind the last block of a vision transformer only the class token does.

    Raises:
        UserError: there is none.
    """
    layers = {
        name: module
        for name, module in model.trunk.named_modules()
        if name and name.count(".") < _DEPTH
    }
    logits, outputs = _logits(model, image, layers)
    if not outputs:
        raise UserError(
            "no heatmap can be made: no layer of this network has more than one place, as of images"
            f" of {image.shape[-1]} pixels; a network of convolutions or of tokens has them"
        )
    score = _of_class(logits, label).sum()
    gradients = torch.autograd.grad(score, list(outputs.values()), allow_unused=True)
    for name, gradient in reversed(list(zip(outputs, gradients, strict=True))):
        if gradient is not None and _counts_in_many_places(gradient):
            return name
    return list(outputs)[-1]  # a head of zeros: whatever the layer, nothing speaks for a class


def _counts_in_many_places(gradient: torch.Tensor) -> bool:
    by_place = _by_place(gradient)
    assert by_place is not None
    strength = by_place.abs().sum((0, 3)).flatten()
    return int((strength > 1e-6 * strength.max()).sum()) > 1


def _of_class(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _logits(
    model: Classifier, images: torch.Tensor, layers: dict[str, nn.Module]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each image's scores, and what those of the layers gave that have places, in the order in
    which they did; the scores lead back to them."""
    outputs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, torch.Tensor) or _by_place(output) is None:
                return None
            if not outputs:  # the way back ends at the first
                output = output.detach().requires_grad_()
            outputs.pop(name, None)  # a layer that is used twice
            # a copy: where the layer above changes it in place, it is what that one gave
            outputs[name] = output.clone()
            return outputs[name]

        return note

    hooks = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, outputs


def _by_place(output: torch.Tensor) -> torch.Tensor | None:
    """A layer's output as (n, h, w, channels); None where it has no places, or one only.

    Places are the two equal sides of (n, C, h, w), of (n, h, w, C), or of the tokens (n, L, C)
    behind those of no place.
    """
    if output.ndim == 4:
        _, first, second, third = output.shape
        if second == third > 1:
            return output.permute(0, 2, 3, 1)
        return output if first == second > 1 else None
    if output.ndim != 3:
        return None
    side = math.isqrt(output.shape[1])
    beside = output.shape[1] - side * side
    if side < 2 or beside > _MOST_TOKENS_BESIDE:
        return None
    return output[:, beside:].unflatten(1, (side, side))
