"""Model folders of a tiny network that knows colours, made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from rtl_dist.config import parse_config
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import DatasetPlace
from rtl_dist.model.build import build_model
from rtl_dist.model.folder import write_model_folder

COLOURS = ("blue", "green", "red")


def write_model(
    folder: Path, *, task: str = "single_label", size: int = 16, channels: int = 3
) -> Path:
    """``basic_cnn`` of random weights and lively BatchNorm, in evaluation's full float32."""
    config = parse_config(
        {
            "data": {"path": "d", "image_size": size, "channels": channels, "crop_pct": 1.0},
            "model": {"name": "basic_cnn", "weights": "none"},
            "stages": [{"name": "s", "epochs": 1, "lr": 0.1}],
            "run": {"dir": "r"},
            "precision": "no",
        }
    )
    dataset = Dataset(
        place=DatasetPlace(where=""),
        task=task,
        classes=COLOURS,
        fingerprint="f" * 64,
        description={},
    )
    model, _ = build_model(config.model, config.data, classes=COLOURS, seed=1)
    with torch.no_grad():
        model.head.weight.mul_(20)
    write_model_folder(folder, model, config.model, dataset, precision=config.precision)
    return folder
