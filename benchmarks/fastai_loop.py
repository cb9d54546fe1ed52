"""Transfer learning with fastai, as its documentation writes it, to measure ours against.

`finetune` is `vision_learner(...).fine_tune(epochs)` and `head` its first phase made long:
`learn.freeze(); learn.fit_one_cycle(epochs)`. All else is fastai's default: its head (two linear
layers on average and maximum of the features, with BatchNorm and dropout), Adam, one-cycle rates,
batches of 64, two workers on two CPUs, float32; the frozen body's BatchNorm layers learn
(`train_bn=True`), so steps run backward through the body in either mode. Images are cropped as in
fastai's Imagenette tutorial, RandomResizedCrop(224, min_scale=0.35) and flips, which costs a CPU
less than `Resize(460)` with `aug_transforms`; `--augment presize` takes those.

fastai also reads GIFs, which torchvision's `ImageFolder` passes over.

    python benchmarks/fastai_loop.py --data DIR --weights resnet18.pth --mode head --seed 0

`DIR` holds `train/<class>/` and `val/<class>/`; the weights are a torchvision ResNet-18 state dict.
Printed: one JSON object. 15 epochs take 4 to 12 minutes of two CPU cores on 1,000 and 500 images.
With `--scores FILE`, what the best epoch said of every validation image is written there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner  # with fine_tune and fit_one_cycle
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, RandomResizedCrop, Resize, aug_transforms
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import model_meta, vision_learner
from frozen_loop import LoopResult, Validation, summarise
from scores import write_scores
from torch import nn
from torchvision.models import resnet18

Mode = Literal["head", "finetune"]
Augment = Literal["crop", "presize"]


class History(Callback):
    """Notes each validation and when it was done, and writes what the best one said.

    scores: where to; None: nowhere.
    """

    order = 60  # after the Recorder

    def __init__(self, started_at: float, scores: Path | None) -> None:
        self.records: list[Validation] = []
        self._started_at = started_at
        self._scores = scores
        self._said: list[torch.Tensor] = []

    def after_pred(self) -> None:
        if not self.training:
            self._said.append(self.pred.detach().softmax(1).cpu())

    def after_epoch(self) -> None:
        top1 = float(self.learn.final_record[-1])
        if self._scores and top1 > max((r["val_top1"] for r in self.records), default=-1):
            stems = [Path(file).stem for file in self.learn.dls.valid.items]
            write_scores(self._scores, stems, torch.cat(self._said).numpy())
        self._said.clear()
        self.records.append(
            Validation(
                epoch=len(self.records),
                elapsed_s=time.perf_counter() - self._started_at,
                val_top1=top1,
            )
        )


def make_learner(
    data_dir: Path, weights: Path, augment: Augment, history: History, image_size: int
) -> Learner:
    """fastai's ResNet-18 learner, with weights from a file instead of the hub."""

    def arch(**_: Any) -> nn.Module:
        model = resnet18()
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return model

    model_meta[arch] = model_meta[resnet18]
    if augment == "crop":
        item_tfms, batch_tfms = RandomResizedCrop(image_size, min_scale=0.35), Flip()
    else:
        item_tfms, batch_tfms = (
            Resize(image_size * 460 // 224),
            aug_transforms(size=image_size, min_scale=0.75),
        )
    dls = ImageDataLoaders.from_folder(
        data_dir, train="train", valid="val", item_tfms=item_tfms, batch_tfms=batch_tfms
    )
    return vision_learner(dls, arch, metrics=accuracy, cbs=history)


def run_fastai(
    data_dir: Path,
    weights: Path,
    mode: Mode,
    augment: Augment,
    seed: int,
    epochs: int,
    image_size: int,
    scores: Path | None,
) -> LoopResult:
    """Trains by one of the two recipes; `finetune` has one frozen epoch before the others."""
    started_at = time.perf_counter()
    set_seed(seed)
    history = History(started_at, scores)
    learn = make_learner(data_dir, weights, augment, history, image_size)
    with learn.no_bar(), learn.no_logging():
        if mode == "head":
            learn.freeze()
            learn.fit_one_cycle(epochs)
        else:
            learn.fine_tune(epochs)
    return summarise(history.records, started_at)


def main() -> None:
    """Run once from the command line and print the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="holds train/ and val/ folders")
    parser.add_argument("--weights", type=Path, required=True, help="ResNet-18 state dict")
    parser.add_argument("--mode", choices=("head", "finetune"), default="finetune")
    parser.add_argument("--augment", choices=("crop", "presize"), default="crop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--scores", type=Path, help="written: what the best epoch said")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
        result = run_fastai(
            args.data,
            args.weights,
            args.mode,
            args.augment,
            args.seed,
            args.epochs,
            args.image_size,
            args.scores,
        )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
