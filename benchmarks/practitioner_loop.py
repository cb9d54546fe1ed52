"""Fine-tuning as a strong practitioner writes it for one afternoon, to measure ours against.

The head alone for a tenth of the epochs, then all of it: AdamW, 1e-4 below and 1e-3 for the head,
warm-up and a cosine, BatchNorm held at the weights' statistics, RandomResizedCrop from .35 and
flips, label smoothing .1 (multi-label: binary cross entropy), bfloat16 where the hardware has it,
channels-last, and the best of about fifteen evaluations. 15 epochs, or as many as 300 steps take.

    python benchmarks/practitioner_loop.py --data DIR --weights resnet18.pth --seed 0

`DIR` holds `train/<class>/` and `val/<class>/`, or `train.csv` and `val.csv` with 0/1 columns; the
weights are a torchvision ResNet-18 state dict, or a folder that timm loads. Printed: one JSON
object; `images` counts every one that went through the network.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from loop_data import NUM_WORKERS, Backbone, Images, has_bf16, load_backbone, metric
from scores import write_scores
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

BATCH_SIZE = 32
FEWEST_STEPS = 300
NUM_EVALUATIONS = 15


def make_loaders(
    args: argparse.Namespace, backbone: Backbone
) -> tuple[Images, DataLoader, Images, DataLoader]:
    crop = v2.RandomResizedCrop(args.image_size, (args.min_crop, 1.0))
    flip = v2.RandomHorizontalFlip(0.0 if args.no_flip else 0.5)
    train = Images(args.data, "train", v2.Compose([crop, flip, *backbone.to_input()]))
    val = Images(args.data, "val", backbone.eval_transform(args.image_size))
    train_loader = DataLoader(train, BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS)
    return train, train_loader, val, DataLoader(val, 2 * BATCH_SIZE, num_workers=NUM_WORKERS)


def make_optimizer(
    args: argparse.Namespace, network: nn.Module, head: nn.Module, num_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW(
        [
            {"params": network.parameters(), "lr": args.lr},
            {"params": head.parameters(), "lr": args.head_lr},
        ],
        weight_decay=0.05,
    )

    def factor(step: int) -> float:
        return (
            min(1, (step + 1) / (0.1 * num_steps)) * (1 + math.cos(math.pi * step / num_steps)) / 2
        )

    return optimizer, LambdaLR(optimizer, factor)


def run(args: argparse.Namespace) -> dict[str, Any]:
    started_at = time.perf_counter()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(args.weights)
    train, train_loader, val, val_loader = make_loaders(args, backbone)
    epochs = args.epochs or max(15, math.ceil(FEWEST_STEPS / len(train_loader)))
    head_epochs, evaluate_every = max(1, epochs // 10), max(1, epochs // NUM_EVALUATIONS)
    network = backbone.network.to(device)
    head = nn.Linear(backbone.num_features, len(train.classes)).to(device)
    optimizer, scheduler = make_optimizer(args, network, head, epochs * len(train_loader))
    loss_of = (
        nn.BCEWithLogitsLoss() if val.is_multi_label else nn.CrossEntropyLoss(label_smoothing=0.1)
    )
    bf16 = has_bf16() and not args.float32

    def forward(images: torch.Tensor, *, frozen: bool) -> torch.Tensor:
        images = images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.set_grad_enabled(not frozen):
                features = network(images)
            return head(features).float()

    history, best, kept, num_images = [], -1.0, None, 0
    for epoch in range(epochs):
        is_frozen = epoch < head_epochs
        network.train(args.batchnorm == "train" and not is_frozen)
        for images, targets in train_loader:
            loss = loss_of(forward(images, frozen=is_frozen), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        num_images += len(train)
        if (epoch + 1) % evaluate_every and epoch + 1 < epochs:
            continue
        network.eval()
        with torch.no_grad():
            logits = torch.cat([forward(images, frozen=True) for images, _ in val_loader])
        num_images += len(val)
        scores = (logits.sigmoid() if val.is_multi_label else logits.softmax(1)).cpu().numpy()
        value = metric(scores, val.targets.numpy())
        elapsed_s = time.perf_counter() - started_at
        history.append({"epoch": epoch, "elapsed_s": elapsed_s, "value": value})
        if value > best:
            best, kept = value, scores
    if args.scores:
        write_scores(args.scores, val.stems, kept)
    seconds = time.perf_counter() - started_at
    return {"best": best, "seconds": seconds, "images": num_images, "history": history}


def main() -> None:
    """Run once from the command line and print the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="15, or as many as 300 steps take")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--min-crop", type=float, default=0.35)
    parser.add_argument("--no-flip", action="store_true")
    parser.add_argument("--batchnorm", choices=("frozen", "train"), default="frozen")
    parser.add_argument("--float32", action="store_true", help="even where there is bfloat16")
    parser.add_argument("--scores", type=Path, help="written: what the best evaluation said")
    print(json.dumps(run(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
