"""``recipe: auto``: what fine-tuning needs to know, chosen by the number of training images.

How each rule was measured, and on which data sets: docs/recipes.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from rtl_dist.config.stage import StageConfig

_HEAD = {"name": "head", "trainable": "head", "solve": True}
_FINETUNE = {"name": "finetune", "trainable": "all"}
_LAYER_DECAY = 0.5
_WARMUP = 0.3

SMALLEST_BATCH = 32  # and the larger ones are its multiples
_LARGER_BATCH = 64
_LARGER_FROM = 10_000  # images
_STEPS = 480  # of a small data set
_MOST_EPOCHS, _FEWEST_EPOCHS = 40, 8
_RATE = 1e-3  # at the smallest batch


def lay_under(tree: dict[str, Any]) -> None:
    """Where a config's tree says ``recipe: auto``, makes auto what it leaves open."""
    if tree.get("recipe") != "auto":
        return
    stages = tree.get("stages") or [dict(_HEAD), dict(_FINETUNE)]
    tree["stages"] = stages
    batch = tree.setdefault("batch", {})
    if isinstance(batch, dict):
        batch.setdefault("global", "auto")
    for stage in stages if isinstance(stages, list) else []:
        if not isinstance(stage, dict) or stage.get("trainable", "all") != "all":
            continue
        if not stage.keys() & {"epochs", "steps"}:
            stage["epochs"] = "auto"
        if "lr" not in stage:
            stage["lr"] = "auto"
            stage.setdefault("layer_decay", _LAYER_DECAY)
        sections = [stage.get("optim"), tree.get("optim")]
        if not any(isinstance(section, dict) and "warmup" in section for section in sections):
            stage.setdefault("warmup", _WARMUP)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was chosen, in the words of a config."""

    batch: int
    """Of ``batch.global``."""
    stages: list[StageConfig]
    """Without an auto."""
    told: list[str]
    """What was chosen and why, a line each."""


def recipe_for(
    stages: list[StageConfig],
    num_images: int,
    *,
    batch: int | Literal["auto"] = "auto",
    micro: int | Literal["auto"] = "auto",
) -> Recipe:
    """What each auto becomes for so many training images.

    Args:
        batch: ``batch.global``.
        micro: ``batch.micro``; a batch that is chosen is a multiple of it.
    """
    told = []
    if batch == "auto":
        parts = 1 if micro == "auto" else micro
        batch = math.ceil(_batch_for(num_images) / parts) * parts
        told.append(f"batch.global {batch}: for {num_images:,} training images")
    filled = []
    for number, stage in enumerate(stages):
        if stage.epochs == "auto":
            epochs = _epochs_for(num_images)
            steps = math.ceil(epochs * num_images / batch)
            told.append(f"stages.{number}.epochs {epochs}: {steps:,} steps")
            stage = replace(stage, epochs=epochs)
        if stage.lr == "auto":
            rate = float(f"{_RATE * math.sqrt(batch / SMALLEST_BATCH):.2g}")
            why = f"{_RATE:g} at a batch of {SMALLEST_BATCH}, by the root of it"
            told.append(f"stages.{number}.lr {rate:g}: {why}")
            stage = replace(stage, lr=rate)
        filled.append(stage)
    return Recipe(batch=batch, stages=filled, told=told)


def kept(stages: list[StageConfig], chosen: list[StageConfig]) -> list[StageConfig]:
    """``stages`` with each auto as it was chosen before, for the same stages."""
    if len(stages) != len(chosen):
        return stages
    return [
        replace(
            stage,
            lr=before.lr if stage.lr == "auto" else stage.lr,
            epochs=before.epochs if stage.epochs == "auto" else stage.epochs,
        )
        for stage, before in zip(stages, chosen, strict=True)
    ]


def _batch_for(num_images: int) -> int:
    return SMALLEST_BATCH if num_images < _LARGER_FROM else _LARGER_BATCH


def _epochs_for(num_images: int) -> int:
    wanted = math.ceil(_STEPS * SMALLEST_BATCH / num_images)
    return min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, wanted))
