"""Training only a head on a frozen ResNet-18, as a plain PyTorch loop, to measure ours against.

The loop that people write by hand when they know what they do: the backbone takes no gradient,
stays in `eval()` and runs under `torch.no_grad()`, so that a step costs one forward pass and next
to nothing else; but it runs on every image in every epoch, training and validation. `ImageFolder`,
RandomResizedCrop(224) and flips, two persistent workers, float32, NCHW, batches of 64, AdamW with a
cosine over the whole run (optimizer and rate of `head_stage.yaml`), a validation after each epoch.

    python benchmarks/frozen_loop.py --data DIR --weights resnet18.pth --seed 0

`DIR` holds `train/<class>/` and `val/<class>/`; the weights are a torchvision ResNet-18 state dict.
Printed: one JSON object. 15 epochs take 2 to 4 minutes of two CPU cores on 1,000 and 500 images.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

BATCH_SIZE = 64
NUM_WORKERS = 2
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.05
NUM_FEATURES = 512
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class Validation(TypedDict):
    """What one validation found."""

    epoch: int
    elapsed_s: float
    """Since the run began, this validation included."""
    val_top1: float


class LoopResult(TypedDict):
    """One run of a loop."""

    best_val_top1: float
    seconds: float
    """From building the data sets and the model to the last validation, imports left out."""
    history: list[Validation]


def make_loaders(
    data_dir: Path, batch_size: int, image_size: int = 224
) -> tuple[DataLoader, DataLoader, int]:
    """Training and validation loaders, and the number of classes."""
    to_input = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    train_transform = v2.Compose(
        [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *to_input]
    )
    val_transform = v2.Compose(
        [v2.Resize(image_size * 256 // 224), v2.CenterCrop(image_size), *to_input]
    )
    train_set = ImageFolder(str(data_dir / "train"), train_transform)
    val_set = ImageFolder(str(data_dir / "val"), val_transform)
    if train_set.classes != val_set.classes:
        raise ValueError(
            f"train and val name different classes: {train_set.classes} and {val_set.classes}"
        )
    loaders = [
        DataLoader(
            part,
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=NUM_WORKERS,
            persistent_workers=True,
        )
        for part, shuffle in ((train_set, True), (val_set, False))
    ]
    return loaders[0], loaders[1], len(train_set.classes)


def make_backbone(weights: Path) -> nn.Module:
    """A ResNet-18 with the given weights that yields its 512 features."""
    backbone = resnet18()
    backbone.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    backbone.fc = nn.Identity()
    return backbone


def summarise(history: list[Validation], started_at: float) -> LoopResult:
    """The result of a run that began at ``started_at`` on ``time.perf_counter()``."""
    return LoopResult(
        best_val_top1=max(record["val_top1"] for record in history),
        seconds=time.perf_counter() - started_at,
        history=history,
    )


@torch.no_grad()
def validate(backbone: nn.Module, head: nn.Module, loader: DataLoader) -> float:
    """Top-1 accuracy."""
    device = next(head.parameters()).device
    num_correct, num_samples = 0, 0
    for images, labels in loader:
        logits = head(backbone(images.to(device)))
        num_correct += int((logits.argmax(1) == labels.to(device)).sum())
        num_samples += len(labels)
    return num_correct / num_samples


def run_frozen(data_dir: Path, weights: Path, seed: int, epochs: int) -> LoopResult:
    """Trains a head for some epochs."""
    started_at = time.perf_counter()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, val_loader, num_classes = make_loaders(data_dir, BATCH_SIZE)
    backbone = make_backbone(weights).requires_grad_(False).eval().to(device)
    head = nn.Linear(NUM_FEATURES, num_classes).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs * len(train_loader))

    history: list[Validation] = []
    for epoch in range(epochs):
        for images, labels in train_loader:
            with torch.no_grad():
                features = backbone(images.to(device))
            loss = nn.functional.cross_entropy(head(features), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        val_top1 = validate(backbone, head, val_loader)
        elapsed_s = time.perf_counter() - started_at
        history.append(Validation(epoch=epoch, elapsed_s=elapsed_s, val_top1=val_top1))
    return summarise(history, started_at)


def main() -> None:
    """Run once from the command line and print the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="holds train/ and val/ folders")
    parser.add_argument("--weights", type=Path, required=True, help="ResNet-18 state dict")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    print(json.dumps(run_frozen(args.data, args.weights, args.seed, args.epochs), indent=1))


if __name__ == "__main__":
    main()
