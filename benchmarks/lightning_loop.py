"""Transfer learning with Lightning, as its documentation writes it, to measure ours against.

`head`: the head alone. `--freeze callback` uses Lightning's `BackboneFinetuning`, never unfreezing.
Under that callback the backbone's BatchNorm layers stay in training mode and keep their gradients
(it calls `freeze` with `train_bn=True`, whatever its own `train_bn` says), so every step runs
backward through the whole backbone. `--freeze no_grad` is the other way in Lightning's
documentation ("Transfer Learning": the extractor in `eval()` under `torch.no_grad()`), which is
faster. Optimizer, rate and batch are those of `head_stage.yaml`: AdamW 1e-2, cosine, batches of 64.

`finetune`: head first, then the backbone at a lower rate, as in the callback's documentation: Adam
1e-3 on the head; the backbone joins at a tenth of that and gains a factor 1.5 an epoch until it
has the head's. It joins at epoch 5 of 15, as in Lightning's own fine-tuning example (the callback's
default is 10). Batches of 32.

Data, crops, workers and precision are those of `frozen_loop.py`. Logger, checkpoints, progress
bar, model summary and sanity check are off, so Lightning's time here is a little shorter than by
default.

    python benchmarks/lightning_loop.py --data DIR --weights resnet18.pth --mode head --seed 0

`DIR` holds `train/<class>/` and `val/<class>/`; the weights are a torchvision ResNet-18 state dict.
Printed: one JSON object. 15 epochs take 3 to 12 minutes of two CPU cores on 1,000 and 500 images.
With `--scores FILE`, what the best epoch said of every validation image is written there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from frozen_loop import (
    BATCH_SIZE,
    LEARNING_RATE,
    NUM_FEATURES,
    WEIGHT_DECAY,
    LoopResult,
    Validation,
    make_backbone,
    make_loaders,
    summarise,
)
from lightning.pytorch.callbacks import BackboneFinetuning
from scores import write_scores
from torch import nn

Mode = Literal["head", "finetune"]
Freeze = Literal["callback", "no_grad"]

FINETUNE_BATCH_SIZE = 32
FINETUNE_LEARNING_RATE = 1e-3
UNFREEZE_AT_EPOCH = 5


class TransferModel(pl.LightningModule):
    """A backbone and a linear head."""

    def __init__(self, weights: Path, num_classes: int, *, mode: Mode, freeze: Freeze) -> None:
        super().__init__()
        self.backbone = make_backbone(weights)
        self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.said: list[torch.Tensor] = []
        self._mode = mode
        self._without_gradient = mode == "head" and freeze == "no_grad"
        if self._without_gradient:
            self.backbone.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._without_gradient:
            self.backbone.eval()
            with torch.no_grad():
                features = self.backbone(images)
        else:
            features = self.backbone(images)
        return self.head(features)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.said.append(logits.softmax(1).cpu())
        top1 = (logits.argmax(1) == labels).float().mean()
        self.log("val_top1", top1, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        parameters = self.head.parameters()  # the callback adds the backbone's
        if self._mode == "finetune":
            return torch.optim.Adam(parameters, lr=FINETUNE_LEARNING_RATE)
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class History(pl.Callback):
    """Notes each validation and when it was done, and writes what the best one said.

    scores: where to; None: nowhere.
    """

    def __init__(self, started_at: float, scores: Path | None) -> None:
        self.records: list[Validation] = []
        self._started_at = started_at
        self._scores = scores

    def on_validation_end(self, trainer: pl.Trainer, pl_module: TransferModel) -> None:
        top1 = float(trainer.callback_metrics["val_top1"])
        if self._scores and top1 > max((r["val_top1"] for r in self.records), default=-1):
            stems = [Path(file).stem for file, _ in trainer.val_dataloaders.dataset.samples]
            write_scores(self._scores, stems, torch.cat(pl_module.said).numpy())
        pl_module.said.clear()
        self.records.append(
            Validation(
                epoch=trainer.current_epoch,
                elapsed_s=time.perf_counter() - self._started_at,
                val_top1=top1,
            )
        )


def run_lightning(
    data_dir: Path,
    weights: Path,
    mode: Mode,
    freeze: Freeze,
    seed: int,
    epochs: int,
    image_size: int,
    scores: Path | None,
) -> LoopResult:
    """Trains by one of the two recipes for some epochs."""
    started_at = time.perf_counter()
    pl.seed_everything(seed, workers=True, verbose=False)
    batch_size = BATCH_SIZE if mode == "head" else FINETUNE_BATCH_SIZE
    train_loader, val_loader, num_classes = make_loaders(data_dir, batch_size, image_size)
    model = TransferModel(weights, num_classes, mode=mode, freeze=freeze)
    history = History(started_at, scores)
    callbacks: list[pl.Callback] = [history]
    if mode == "finetune" or freeze == "callback":
        callbacks.append(
            BackboneFinetuning(
                unfreeze_backbone_at_epoch=epochs if mode == "head" else UNFREEZE_AT_EPOCH,
                lambda_func=lambda epoch: 1.5,
                backbone_initial_ratio_lr=0.1,
            )
        )
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, train_loader, val_loader)
    return summarise(history.records, started_at)


def main() -> None:
    """Run once from the command line and print the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="holds train/ and val/ folders")
    parser.add_argument("--weights", type=Path, required=True, help="ResNet-18 state dict")
    parser.add_argument("--mode", choices=("head", "finetune"), default="finetune")
    parser.add_argument("--freeze", choices=("callback", "no_grad"), default="callback")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--scores", type=Path, help="written: what the best epoch said")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
        result = run_lightning(
            args.data,
            args.weights,
            args.mode,
            args.freeze,
            args.seed,
            args.epochs,
            args.image_size,
            args.scores,
        )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
