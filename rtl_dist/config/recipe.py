"""``recipe: auto``: the batch and the stages of a fine-tuning, by the number of training images.

How each rule was measured, and on which data sets: docs/recipes.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rtl_dist.config.stage import StageConfig

_BATCH = 32
_LARGER_BATCH = 64
_LARGER_FROM = 10_000  # images
_STEPS = 480  # of a small data set
_MOST_EPOCHS, _FEWEST_EPOCHS = 40, 8
_RATE = 1e-3  # at a batch of _BATCH
_LAYER_DECAY = 0.75
_WARMUP = 0.3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was chosen, in the words of a config."""

    batch: int
    """Of ``batch.global``."""
    stages: list[StageConfig]
    """The head solved, then all of the network trained."""
    told: list[str]
    """What was chosen and why, a line each."""


def recipe_for(num_images: int, *, batch: int | None = None, micro: int | None = None) -> Recipe:
    """The recipe for so many training images.

    Args:
        batch: ``batch.global``, where the config says it.
        micro: ``batch.micro``, where the config says it; a batch that is chosen is a multiple.
    """
    chosen = batch or _batch_for(num_images, micro or 1)
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_STEPS * _BATCH / num_images)))
    rate = float(f"{_RATE * math.sqrt(chosen / _BATCH):.2g}")
    finetune = StageConfig(
        name="finetune",
        epochs=epochs,
        trainable="all",
        lr=rate,
        layer_decay=_LAYER_DECAY,
        warmup=_WARMUP,
    )
    steps = math.ceil(epochs * num_images / chosen)
    return Recipe(
        batch=chosen,
        stages=[StageConfig(name="head", trainable="head", solve=True), finetune],
        told=[
            f"batch.global {chosen}: "
            + ("as the config says" if batch else f"for {num_images:,} training images"),
            f"stages.1.epochs {epochs}: {steps:,} steps",
            f"stages.1.lr {rate:g}: {_RATE:g} at a batch of {_BATCH}, by the root of the batch",
        ],
    )


def _batch_for(num_images: int, micro: int) -> int:
    wanted = _BATCH if num_images < _LARGER_FROM else _LARGER_BATCH
    return math.ceil(wanted / micro) * micro
