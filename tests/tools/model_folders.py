"""Models that were never trained, as folders, for the tests of what uses a trained one."""

from __future__ import annotations

from pathlib import Path

import torch
from networks import moved_statistics

from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.tasks import SINGLE_LABEL, Task
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import DatasetPlace
from rtl_dist.model.build import make_classifier
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.folder import write_calibration, write_model_folder

CLASSES = ("blue", "green", "red")  # those of ``tiny_runs.make_dataset``


def model_folder(
    folder: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    task: Task = SINGLE_LABEL,
    calibration: Calibration | None = None,
    image_size: int = 16,
    channels: int = 3,
    seed: int = 0,
    sharpness: float = 2.0,
) -> Path:
    """A small CNN with weights of chance that says another thing of each image.

    sharpness: how far its logits are from 0, about.
    """
    data = DataConfig(path="", image_size=image_size, channels=channels, crop_pct=0.9)
    config = ModelConfig(name="basic_cnn", weights="none")
    model = moved_statistics(make_classifier(config, data, num_classes=len(classes), seed=seed))
    _spread(model.eval(), sharpness)
    dataset = Dataset(
        place=DatasetPlace(where=""),
        task=task,
        classes=classes,
        fingerprint="f" * 64,
        description={},
    )
    write_model_folder(folder, model, config, dataset, precision="no")
    if calibration is not None:
        write_calibration(folder, calibration)
    return folder


@torch.no_grad()
def _spread(model: Classifier, sharpness: float) -> None:
    """Puts the middle of a head's logits of tinted noise at 0, and their spread at ``sharpness``."""
    generator = torch.Generator().manual_seed(3)
    size, channels = model.preprocessing.image_size, model.preprocessing.channels
    noise = torch.randint(0, 160, (64, channels, size, size), generator=generator)
    tints = torch.randint(0, 90, (64, channels, 1, 1), generator=generator)
    features = model.features((noise + tints).to(torch.uint8))
    model.head.bias.zero_()
    model.head.weight.mul_(sharpness / model.classify(features).std(0).mean())
    model.head.bias.sub_(model.classify(features).mean(0))
