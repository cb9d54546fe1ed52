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

_BATCH, _LARGER_BATCH = 32, 64
_LARGER_FROM = 10_000  # images
STEPS = 480  # of a small data set
_MOST_EPOCHS, _FEWEST_EPOCHS = 40, 8
RATE = 1e-3  # at the smaller batch


def give_stages(tree: dict[str, Any]) -> None:
    """Names the stages of a recipe in a config's tree that has none."""
    if not tree.get("stages"):
        tree["stages"] = [dict(_HEAD), dict(_FINETUNE)]


def lay_under(tree: dict[str, Any]) -> None:
    """Makes auto what a config's tree with ``recipe: auto`` leaves open, and says there, as beside
    each rate that is auto without a recipe, what such rates were measured together with."""
    is_open = tree.get("recipe") == "auto"
    if is_open:
        give_stages(tree)
        if tree.get("batch") is None:
            tree["batch"] = {}
        if isinstance(tree["batch"], dict):
            tree["batch"].setdefault("global", "auto")
    stages = tree.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if not isinstance(stage, dict):
            continue
        fills = is_open and stage.get("trainable", "all") == "all"
        if fills:
            if stage.get("epochs") is None and stage.get("steps") is None:
                stage["epochs"] = "auto"
            stage.setdefault("lr", "auto")
        if fills or stage.get("lr") == "auto":
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
    """What was chosen and why, ``key value: reason`` each."""


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
        batch = batches_with(micro)[num_images >= _LARGER_FROM]
        told.append(f"batch.global {batch}: for {num_images:,} training images")
    filled = []
    for number, stage in enumerate(stages):
        if stage.epochs == "auto":
            wanted = math.ceil(STEPS * _BATCH / num_images)
            epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, wanted))
            told.append(
                f"stages.{number}.epochs {epochs}: {STEPS} steps of {_BATCH} images, but"
                f" {_FEWEST_EPOCHS} to {_MOST_EPOCHS} epochs"
            )
            stage = replace(stage, epochs=epochs)
        if stage.lr == "auto":
            rate = float(f"{RATE * math.sqrt(batch / _BATCH):.2g}")
            scaled = "" if batch == _BATCH else f", times the square root of {batch} / {_BATCH}"
            why = f"{RATE:g} for batches of {_BATCH}{scaled}"
            told.append(f"stages.{number}.lr {rate:g}: {why}")
            stage = replace(stage, lr=rate)
        filled.append(stage)
    return Recipe(batch=batch, stages=filled, told=told)


def batches_with(micro: int | Literal["auto"]) -> tuple[int, int]:
    """The batches of which one is chosen: of few images, of many."""
    parts = 1 if micro == "auto" else micro
    return math.ceil(_BATCH / parts) * parts, math.ceil(_LARGER_BATCH / parts) * parts


def lines_that_hold(
    recipe: str | list[str] | None, values: dict[str, float | Literal["auto"] | None]
) -> dict[str, str]:
    """Of the lines that an earlier ``Recipe.told`` left in a config, by key, those whose values are
    still the config's. A person may have changed the lines as well.

    values: of the config, see ``Config.of_recipe``.
    """
    now = {
        f"{key} {value:g}": key for key, value in values.items() if isinstance(value, int | float)
    }
    lines = recipe if isinstance(recipe, list) else []
    claims = {line.partition(":")[0]: line for line in lines}
    return {key: claims[claim] for claim, key in now.items() if claim in claims}
