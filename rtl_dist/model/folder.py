"""A model folder: ``model.safetensors`` and a ``config.json`` with labels and preprocessing inside.

timm itself loads it: ``timm.create_model("local-dir:runs/x/best", pretrained=True)``. With
``model.small_stem`` timm refuses the weights, as it has no name for that network; docs/training.md
has the lines that load it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtl_dist import __version__
from rtl_dist.config import (
    DataConfig,
    ModelConfig,
    Precision,
    parse_section,
    read_run_config,
)
from rtl_dist.core.errors import UserError
from rtl_dist.core.files import replacing, save_tensors, write_json
from rtl_dist.core.tasks import Task
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.model.build import make_classifier
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.weights import read_state_dict

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A classifier ready to score images, and what it was trained to tell apart."""

    model: Classifier
    """On the CPU."""
    classes: tuple[str, ...]
    """Names, in the order of the scores."""
    task: Task
    """Of the data that it was trained on."""
    dataset_fingerprint: str
    """Of the data set that it was trained on."""
    precision: Precision
    """That it was trained in."""
    source: Path
    """The folder that the weights are from."""


def write_model_folder(
    folder: Path,
    model: Classifier,
    config: ModelConfig,
    dataset: Dataset,
    *,
    precision: Precision,
) -> None:
    """Writes or replaces a model folder; each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    description = describe_model(model, config, dataset, precision=precision)
    write_json(folder / DESCRIPTION, description)
    with replacing(folder / WEIGHTS) as path:
        save_tensors(model.native_state_dict(), path, metadata={"format": "pt"})


def describe_model(
    model: Classifier, config: ModelConfig, dataset: Dataset, *, precision: Precision
) -> dict[str, Any]:
    """The content of ``config.json``: timm's keys, and ours under ``rtl_dist``."""
    view = model.preprocessing
    first_conv = next(
        name for name, m in model.trunk.named_modules() if isinstance(m, torch.nn.Conv2d)
    )
    stem = {"small_stem": True} if config.small_stem else {}
    return {
        # without the tag of the weights that it began from: these are others now
        "architecture": config.name.removeprefix("torchvision:").partition(".")[0],
        "num_classes": dataset.num_classes,
        "num_features": model.head.in_features,
        "label_names": list(dataset.classes),
        "model_args": {"in_chans": view.channels},
        "pretrained_cfg": {
            "input_size": [view.channels, view.image_size, view.image_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": view.crop_pct,
            "crop_mode": "center",
            "mean": list(view.mean),
            "std": list(view.std),
            "num_classes": dataset.num_classes,
            "first_conv": first_conv,
            "classifier": model.native_head,
        },
        "rtl_dist": {
            "version": __version__,
            "model": {"name": config.name, "dropout": config.dropout} | stem,
            "precision": precision,
            "task": dataset.task,
            "dataset_fingerprint": dataset.fingerprint,
        },
    }


def load_model(path: str | Path) -> LoadedModel:
    """Loads a run folder (its best weights), a checkpoint folder or a model folder.

    Raises:
        UserError: it is none of these, or is damaged.
    """
    given = Path(path)
    for folder in (given / "best", given):
        if (folder / DESCRIPTION).is_file() and (folder / WEIGHTS).is_file():
            return _load_folder(folder)
    if (given / "state.json").is_file() and (given / WEIGHTS).is_file():
        return _load_checkpoint(given)
    what = "has no best/ weights yet" if (given / "config.yaml").is_file() else "is not a model"
    raise UserError(
        f"{path} {what}; give a run folder with best/, a checkpoint folder or an exported folder"
    )


def _load_folder(folder: Path) -> LoadedModel:
    where = folder / DESCRIPTION
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
        ours, view = content["rtl_dist"], content["pretrained_cfg"]
        classes = tuple(content["label_names"])
        channels, image_size, _ = view["input_size"]
        looks = {"image_size": image_size, "crop_pct": view["crop_pct"], "channels": channels}
        task, fingerprint = Task(ours["task"]), ours["dataset_fingerprint"]
        precision = ours["precision"]
        model = make_classifier(
            parse_section(
                ModelConfig, {**ours["model"], "weights": "none"}, origin=f"{where}: rtl_dist.model"
            ),
            parse_section(DataConfig, {"path": "", **looks}, origin=f"{where}: pretrained_cfg"),
            num_classes=len(classes),
            seed=0,
            mean_std=(tuple(view["mean"]), tuple(view["std"])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} was not written by rtl-dist ({error!r})") from error
    _fill(model, folder)
    return LoadedModel(
        model=model,
        classes=classes,
        task=task,
        dataset_fingerprint=fingerprint,
        precision=precision,
        source=folder,
    )


def _load_checkpoint(folder: Path) -> LoadedModel:
    config = read_run_config(folder.resolve().parent.parent)
    identity = json.loads((folder / "state.json").read_text(encoding="utf-8"))["identity"]
    model = make_classifier(
        config.model, config.data, num_classes=len(identity["classes"]), seed=config.seed
    )
    model.load_state_dict(read_state_dict(folder / WEIGHTS))
    return LoadedModel(
        model=model,
        classes=tuple(identity["classes"]),
        task=Task(identity["task"]),
        dataset_fingerprint=identity["dataset_fingerprint"],
        precision=config.precision,
        source=folder,
    )


def _fill(model: Classifier, folder: Path) -> None:
    state = read_state_dict(folder / WEIGHTS)
    prefix = f"{model.native_head}."
    head = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    trunk = {k: v for k, v in state.items() if not k.startswith(prefix)}
    try:
        model.trunk.load_state_dict(trunk)
        model.head.load_state_dict(head)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / WEIGHTS} does not fit its {DESCRIPTION} ({reason})") from error
