"""A model folder: ``model.safetensors`` and a ``config.json`` with labels and preprocessing inside.

timm itself loads it: ``timm.create_model("local-dir:runs/x/best", pretrained=True)``. With
``model.small_stem`` timm refuses the weights, as it has no name for that network; docs/training.md
has the lines that load it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rtl_dist import __version__
from rtl_dist.config import ModelConfig, Precision, read_run_config
from rtl_dist.core.errors import UserError
from rtl_dist.core.files import replacing, save_tensors, write_json
from rtl_dist.core.tasks import Task
from rtl_dist.core.text import brief
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.model.build import make_classifier
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.described import read_description
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
    network: ModelConfig
    """Which network it is, and what was changed of it."""
    calibration: Calibration = field(default_factory=Calibration)
    """How its scores are read; ``dataclasses.replace(loaded, calibration=Calibration())`` is the
    model whose scores are read as they are."""


def write_model_folder(
    folder: Path,
    model: Classifier,
    config: ModelConfig,
    dataset: Dataset,
    *,
    precision: Precision,
) -> None:
    """Writes or replaces a model folder, not calibrated; each file is replaced whole. The
    description comes first, so that no weights are ever read by the calibration of others."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = LoadedModel(
        model=model,
        classes=tuple(dataset.classes),
        task=dataset.task,
        dataset_fingerprint=dataset.fingerprint,
        precision=precision,
        source=folder,
        network=config,
    )
    write_loaded(folder, loaded)


def write_loaded(folder: Path, loaded: LoadedModel) -> None:
    """Writes or replaces the files of a model folder, each whole."""
    write_json(folder / DESCRIPTION, describe_model(loaded))
    with replacing(folder / WEIGHTS) as path:
        save_tensors(loaded.model.native_state_dict(), path, metadata={"format": "pt"})


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """The content of ``config.json``: timm's keys, and ours under ``rtl_dist``."""
    model, config, num_classes = loaded.model, loaded.network, len(loaded.classes)
    view = model.preprocessing
    first_conv = next(
        name for name, m in model.trunk.named_modules() if isinstance(m, torch.nn.Conv2d)
    )
    stem = {"small_stem": True} if config.small_stem else {}
    return {
        # without the tag of the weights that it began from: these are others now
        "architecture": config.name.removeprefix("torchvision:").partition(".")[0],
        "num_classes": num_classes,
        "num_features": model.head.in_features,
        "label_names": list(loaded.classes),
        "model_args": {"in_chans": view.channels},
        "pretrained_cfg": {
            "input_size": [view.channels, view.image_size, view.image_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": view.crop_pct,
            "crop_mode": "center",
            "mean": list(view.mean),
            "std": list(view.std),
            "num_classes": num_classes,
            "first_conv": first_conv,
            "classifier": model.native_head,
        },
        "rtl_dist": {
            "version": __version__,
            "model": {"name": config.name, "dropout": config.dropout} | stem,
            "precision": loaded.precision,
            "task": loaded.task,
            "dataset_fingerprint": loaded.dataset_fingerprint,
        }
        | ({"calibration": fitted} if (fitted := loaded.calibration.to_dict()) else {}),
    }


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Has a model folder say from now on how its scores are read; ``config.json`` is replaced
    whole.

    Raises:
        UserError: it is no model folder.
    """
    where = folder / DESCRIPTION
    read_description(where)
    content = json.loads(where.read_text(encoding="utf-8"))
    content["rtl_dist"].pop("calibration", None)
    if found := calibration.to_dict():
        content["rtl_dist"]["calibration"] = found
    write_json(where, content)


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
    described = read_description(folder / DESCRIPTION)
    state = read_state_dict(folder / WEIGHTS)
    model = _built_to_fit(
        lambda: make_classifier(
            described.model,
            described.data,
            num_classes=len(described.classes),
            seed=0,
            mean_std=described.mean_std,
        ),
        state,
        Classifier.native_state_dict,
        f"{folder / WEIGHTS} does not fit its {DESCRIPTION}",
    )
    _fill(model, state, folder)
    return LoadedModel(
        model=model,
        classes=described.classes,
        task=described.task,
        dataset_fingerprint=described.dataset_fingerprint,
        precision=described.precision,
        source=folder,
        network=described.model,
        calibration=described.calibration,
    )


def _load_checkpoint(folder: Path) -> LoadedModel:
    config = read_run_config(folder.resolve().parent.parent)
    where = folder / "state.json"
    try:
        identity = json.loads(where.read_text(encoding="utf-8"))["identity"]
        classes, task = tuple(map(str, identity["classes"])), Task(identity["task"])
        fingerprint = str(identity["dataset_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} was not written by rtl-dist ({brief(error)})") from error
    state = read_state_dict(folder / WEIGHTS)
    misfit = f"{folder / WEIGHTS} does not fit the run's config.yaml"
    model = _built_to_fit(
        lambda: make_classifier(
            config.model, config.data, num_classes=len(classes), seed=config.seed
        ),
        state,
        Classifier.state_dict,
        misfit,
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise _misfit(misfit, error) from error
    return LoadedModel(
        model=model,
        classes=classes,
        task=task,
        dataset_fingerprint=fingerprint,
        precision=config.precision,
        source=folder,
        network=config.model,
    )


def _built_to_fit(
    build: Callable[[], Classifier],
    state: dict[str, torch.Tensor],
    names: Callable[[Classifier], dict[str, torch.Tensor]],
    misfit: str,
) -> Classifier:
    """A classifier for these weights; first one without memory, so that what a description claims
    is not built before it is seen not to be what the weights are.

    Args:
        names: of the classifier's tensors, as the weights have them.

    Raises:
        UserError: a tensor is missing or of another shape.
    """
    try:
        with torch.device("meta"):
            empty = names(build())
    except (NotImplementedError, RuntimeError):  # a network that looks at its own weights
        return build()
    for name, value in empty.items():
        if name.endswith("num_batches_tracked"):
            continue  # torch does without
        if name not in state:
            raise UserError(f"{misfit} ({name} is missing)")
        if state[name].shape != value.shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(value.shape)}"
            raise UserError(f"{misfit} ({name} is {shapes})")
    return build()


def _misfit(misfit: str, error: RuntimeError) -> UserError:
    return UserError(f"{misfit} ({' '.join(str(error).split())[:200]})")


def _fill(model: Classifier, state: dict[str, torch.Tensor], folder: Path) -> None:
    prefix = f"{model.native_head}."
    head = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    trunk = {k: v for k, v in state.items() if not k.startswith(prefix)}
    try:
        model.trunk.load_state_dict(trunk)
        model.head.load_state_dict(head)
    except RuntimeError as error:
        raise _misfit(f"{folder / WEIGHTS} does not fit its {DESCRIPTION}", error) from error
