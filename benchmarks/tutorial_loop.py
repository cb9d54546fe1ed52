"""The training loop of PyTorch's transfer-learning tutorial, to measure ours against.

It keeps the tutorial's choices: `ImageFolder`, RandomResizedCrop(224) and flips, batches of 4,
SGD (learning rate 1e-3, momentum 0.9), a tenth of the rate every 7 epochs, `model.train()` for the
whole network in both modes (so BatchNorm statistics move even where the parameters are frozen),
and the best validation accuracy of any epoch. Three things differ: the weights come from a file,
two workers load instead of four, and the best weights are not saved to disk, so its time here is
a little shorter than the tutorial's own.

    python benchmarks/tutorial_loop.py --data DIR --weights resnet18.pth --mode finetune --seed 0

`DIR` holds `train/<class>/` and `val/<class>/`; the weights are a torchvision ResNet-18 state dict.
With `--scores FILE`, what the best epoch said of every validation image is written there; the
validation is then not shuffled.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Literal, TypedDict

import torch
from scores import write_scores
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

Mode = Literal["frozen", "finetune"]

BATCH_SIZE = 4
NUM_WORKERS = 2
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class EpochRecord(TypedDict):
    """What one epoch left behind."""

    epoch: int
    train_loss: float
    """Mean over the epoch's samples, each at the weights of its own step."""
    train_top1: float
    val_loss: float
    val_top1: float
    elapsed_s: float
    """Since the run began."""


class TutorialResult(TypedDict):
    """One run of the tutorial's loop."""

    best_val_top1: float
    seconds: float
    """From building the data sets and the model to the last validation, imports left out."""
    history: list[EpochRecord]


def make_loaders(
    data_dir: Path, image_size: int = 224, *, shuffle_val: bool = True
) -> tuple[DataLoader, DataLoader, int]:
    """The tutorial's training and validation loaders, and the number of classes."""
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
        DataLoader(part, batch_size=BATCH_SIZE, shuffle=shuffle, num_workers=NUM_WORKERS)
        for part, shuffle in ((train_set, True), (val_set, shuffle_val))
    ]
    return loaders[0], loaders[1], len(train_set.classes)


def make_model(weights: Path, num_classes: int, mode: Mode) -> nn.Module:
    """A ResNet-18 with the given weights and a fresh last layer; `frozen` trains only that."""
    model = resnet18()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    if mode == "frozen":
        model.requires_grad_(False)
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def run_epoch(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    said: list[torch.Tensor] | None = None,
) -> tuple[float, float]:
    """Go once over `loader`, training if there is an optimizer; mean loss and top-1 accuracy.
    Each batch's scores are added to `said`."""
    training = optimizer is not None
    model.train(training)
    loss_sum, num_correct, num_samples = 0.0, 0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with torch.set_grad_enabled(training):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if said is not None:
            said.append(logits.detach().softmax(1).cpu())
        loss_sum += loss.item() * len(labels)
        num_correct += int((logits.argmax(1) == labels).sum())
        num_samples += len(labels)
    return loss_sum / num_samples, num_correct / num_samples


def run_tutorial(
    data_dir: Path,
    weights: Path,
    mode: Mode,
    seed: int,
    epochs: int = 15,
    image_size: int = 224,
    scores: Path | None = None,
) -> TutorialResult:
    """Run the tutorial's loop and return its best validation accuracy, its time and its history.

    Args:
        data_dir: a folder holding `train/<class>/` and `val/<class>/`.
        weights: a torchvision ResNet-18 state dict.
        mode: `frozen` trains the last layer only, `finetune` the whole network.
        seed: for the last layer, the order and the augmentations.
        epochs: how often the training images are seen.
        image_size: side of the network's input, in pixels.
        scores: file for what the best epoch said of the validation images.
    """
    started_at = time.perf_counter()
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, val_loader, num_classes = make_loaders(
        data_dir, image_size, shuffle_val=scores is None
    )
    model = make_model(weights, num_classes, mode).to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)
    scheduler = StepLR(optimizer, step_size=7, gamma=0.1)

    history: list[EpochRecord] = []
    for epoch in range(epochs):
        train_loss, train_top1 = run_epoch(model, train_loader, device, optimizer)
        scheduler.step()
        said: list[torch.Tensor] = []
        val_loss, val_top1 = run_epoch(model, val_loader, device, said=said)
        if scores is not None and val_top1 > max((r["val_top1"] for r in history), default=-1):
            stems = [Path(file).stem for file, _ in val_loader.dataset.samples]
            write_scores(scores, stems, torch.cat(said).numpy())
        history.append(
            EpochRecord(
                epoch=epoch,
                train_loss=train_loss,
                train_top1=train_top1,
                val_loss=val_loss,
                val_top1=val_top1,
                elapsed_s=time.perf_counter() - started_at,
            )
        )
    return TutorialResult(
        best_val_top1=max(record["val_top1"] for record in history),
        seconds=time.perf_counter() - started_at,
        history=history,
    )


def main() -> None:
    """Run once from the command line and print the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="holds train/ and val/ folders")
    parser.add_argument("--weights", type=Path, required=True, help="ResNet-18 state dict")
    parser.add_argument("--mode", choices=("frozen", "finetune"), default="finetune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--scores", type=Path, help="written: what the best epoch said")
    args = parser.parse_args()
    result = run_tutorial(
        args.data,
        args.weights,
        args.mode,
        args.seed,
        args.epochs,
        args.image_size,
        args.scores,
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
