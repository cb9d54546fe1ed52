"""Whether a network takes the images of a config, tried before it is built for good."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.errors import UserError
from rtl_dist.model.build import make_classifier
from rtl_dist.model.classifier import Classifier


def require_takes(model: ModelConfig, data: DataConfig, sides: Iterable[int]) -> None:
    """Passes images without pixels through the network without weights, which costs no arithmetic.

    Args:
        sides: of the square images, in pixels.

    Raises:
        UserError: it takes none of such a side, or is no classifier of one output in training.
    """
    with torch.device("meta"):
        try:
            network = make_classifier(model, data, num_classes=2, seed=0)
        except (NotImplementedError, RuntimeError):
            return  # a network that looks at its own weights: it will be seen
    for side in sorted(set(sides)):
        _require_scores(network.train(), model.name, data.channels, side)


def _require_scores(network: Classifier, name: str, channels: int, side: int) -> None:
    images = torch.zeros(2, channels, side, side, dtype=torch.uint8, device="meta")
    try:
        with torch.no_grad():
            features = network.trunk(images.float())
            if isinstance(features, torch.Tensor):
                network.head(features)
                return
    except NotImplementedError:
        return
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        own = getattr(network.trunk, "default_cfg", {}).get("input_size", (0, 0))[-1]
        cure = f"{own}, for which it was made" if own else "a larger side"
        raise UserError(
            f"model.name: {name} cannot take images of {side} x {side} ({reason}); set"
            f" data.image_size, and those of stages, to {cure}, or choose another"
        ) from error
    raise UserError(
        f"model.name: {name} gives more than one output in training (auxiliary heads), which"
        " rtl_dist does not train; choose another"
    )
