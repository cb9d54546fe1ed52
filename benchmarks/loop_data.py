"""What logistic_regression.py and practitioner_loop.py share: images, weights, the metric."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.metrics import average_precision_score
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.models import resnet18
from torchvision.transforms import v2

NUM_WORKERS = 2


class Images(Dataset):
    """A split of a folder: class folders, or a table ``<split>.csv`` of 0/1 columns.

    files: in the order of their names.
    targets: int64 (images,), the class's number; of a table float32 (images, classes), 0 or 1.
    """

    def __init__(self, folder: Path, split: str, transform: v2.Transform) -> None:
        table = folder / f"{split}.csv"
        if table.exists():
            with open(table, newline="", encoding="utf-8") as lines:
                (_, *self.classes), *rows = csv.reader(lines)
            self.files = [folder / row[0] for row in rows]
            self.targets = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
        else:
            found = ImageFolder(str(folder / split))
            self.classes = found.classes
            self.files = [Path(file) for file, _ in found.samples]
            self.targets = torch.tensor(found.targets)
        self._transform = transform

    @property
    def is_multi_label(self) -> bool:
        return self.targets.ndim == 2

    @property
    def stems(self) -> list[str]:
        return [file.stem for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._transform(default_loader(str(self.files[number]))), self.targets[number]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network without its head, and how it wants its images.

    mean, std: of the three channels, pixels being 0 to 1.
    crop_pct: an evaluation's centre square, as a share of the short side.
    """

    network: nn.Module
    num_features: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float

    def to_input(self) -> list[v2.Transform]:
        """The last transforms of an image."""
        as_float = v2.ToDtype(torch.float32, scale=True)
        return [v2.ToImage(), as_float, v2.Normalize(list(self.mean), list(self.std))]

    def eval_transform(self, image_size: int) -> v2.Transform:
        resize = v2.Resize(round(image_size / self.crop_pct))
        return v2.Compose([resize, v2.CenterCrop(image_size), *self.to_input()])


def load_backbone(weights: Path) -> Backbone:
    """A torchvision ResNet-18 from a state dict, or any network from a folder that timm loads."""
    if weights.is_dir():
        network = timm.create_model(f"local-dir:{weights}", pretrained=True)
        network.reset_classifier(0)
        seen = network.pretrained_cfg
        mean, std, crop_pct = seen["mean"], seen["std"], seen["crop_pct"]
        num_features = network.num_features
    else:
        network = resnet18()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        num_features, network.fc = network.fc.in_features, nn.Identity()
        mean, std, crop_pct = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875
    return Backbone(
        network=network.to(memory_format=torch.channels_last),
        num_features=num_features,
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=crop_pct,
    )


def has_bf16() -> bool:
    """Whether the hardware multiplies bfloat16; emulated, it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16"})


def metric(scores: np.ndarray, targets: np.ndarray) -> float:
    """Top-1 accuracy; of multi-label targets mean average precision, over the labels that occur."""
    if targets.ndim == 2:
        occurs = targets.any(axis=0)
        return float(average_precision_score(targets[:, occurs], scores[:, occurs]))
    return float((scores.argmax(1) == targets).mean())
