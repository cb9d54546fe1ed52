"""Logistic regression on frozen centre-crop features, with its search, to measure ours against.

Each image goes once through the backbone (bfloat16 where the hardware has it, channels-last), then
scikit-learn's `LogisticRegression` (lbfgs, at most 1,000 iterations; multi-label: one for each
label) is fitted for eight values of C with and without `StandardScaler`, the choice falling by
5-fold cross-validation on the training split. Along the values of C each fit begins where the last
one ended, and the largest, which take longest, are left out once two in a row were no better than a
smaller one. scikit-learn gets one thread: with more it takes more time, not less.

    python benchmarks/logistic_regression.py --data DIR --weights resnet18.pth --seed 0

`DIR` holds `train/<class>/` and `val/<class>/`, or `train.csv` and `val.csv` with 0/1 columns; the
weights are a torchvision ResNet-18 state dict, or a folder that timm loads. The seed deals the
folds. Printed: one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF
from typing import Any

import numpy as np
import torch
from loop_data import NUM_WORKERS, Backbone, Images, has_bf16, load_backbone, metric
from scores import write_scores
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader

BATCH_SIZE = 64
CS = np.logspace(-4, 3, 8)
NUM_FOLDS = 5
GIVE_UP_AFTER = 2


@torch.inference_mode()
def features_of(backbone: Backbone, images: Images, *, bf16: bool) -> np.ndarray:
    """float32 (images, features)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, found = backbone.network.to(device).eval(), []
    for batch, _ in DataLoader(images, BATCH_SIZE, num_workers=NUM_WORKERS):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = network(batch.to(device, memory_format=torch.channels_last))
        found.append(features.float().cpu().numpy())
    return np.concatenate(found)


def along_path(
    train: np.ndarray, targets: np.ndarray, held: np.ndarray, *, num_classes: int, scale: bool
) -> Iterator[np.ndarray]:
    """The scores (images, classes) of ``held``, fitted on ``train``, for each C of ``CS``."""
    if scale:
        scaler = StandardScaler().fit(train)
        train, held = scaler.transform(train), scaler.transform(held)
    columns = [targets] if targets.ndim == 1 else list(targets.T)
    models = [LogisticRegression(max_iter=1000, warm_start=True) for _ in columns]
    for c in CS:
        for model, column in zip(models, columns, strict=True):
            model.set_params(C=c).fit(train, column)
        if targets.ndim == 2:
            yield np.stack([model.predict_proba(held)[:, 1] for model in models], axis=1)
        else:
            scores = np.zeros((len(held), num_classes))  # a fold may lack a rare class
            scores[:, models[0].classes_] = models[0].predict_proba(held)
            yield scores


def search(
    features: np.ndarray, targets: np.ndarray, *, num_classes: int, seed: int
) -> tuple[bool, int, float]:
    """Whether to scale, which of ``CS``, and the cross-validated figure of that choice."""
    smallest = np.bincount(targets).min() if targets.ndim == 1 else 0
    if smallest >= NUM_FOLDS:
        folds: KFold = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    else:
        folds = KFold(NUM_FOLDS, shuffle=True, random_state=seed)
    dealt = list(folds.split(features, targets))
    best = (False, 0, -1.0)
    for scale in (False, True):
        paths = [
            along_path(
                *(features[train], targets[train], features[held]),
                num_classes=num_classes,
                scale=scale,
            )
            for train, held in dealt
        ]
        of_path: list[float] = []
        for scores_of_folds in zip(*paths, strict=True):  # one C a turn
            of_path.append(
                statistics.mean(
                    metric(scores, targets[held])
                    for scores, (_, held) in zip(scores_of_folds, dealt, strict=True)
                )
            )
            if of_path[-1] > best[2]:
                best = (scale, len(of_path) - 1, of_path[-1])
            if len(of_path) - 1 - int(np.argmax(of_path)) >= GIVE_UP_AFTER:
                break
    return best


def cpu_s() -> float:
    """Of this process since it began, its loaders' included."""
    own, children = (resource.getrusage(of) for of in (RUSAGE_SELF, RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def run(args: argparse.Namespace) -> dict[str, Any]:
    started_at = time.perf_counter()
    backbone = load_backbone(args.weights)
    transform = backbone.eval_transform(args.image_size)
    train, val = (Images(args.data, split, transform) for split in ("train", "val"))
    bf16 = has_bf16() and not args.float32
    features, val_features = (features_of(backbone, images, bf16=bf16) for images in (train, val))
    features_cpu_s = cpu_s()
    targets = train.targets.numpy().astype(np.int64)
    num_classes = len(train.classes)
    with threadpool_limits(1):
        scale, number, cross_validated = search(
            features, targets, num_classes=num_classes, seed=args.seed
        )
        path = along_path(features, targets, val_features, num_classes=num_classes, scale=scale)
        scores = next(itertools.islice(path, number, None))
    if args.scores:
        write_scores(args.scores, val.stems, scores)
    best, seconds = metric(scores, val.targets.numpy()), time.perf_counter() - started_at
    return {
        "best": best,
        "seconds": seconds,
        "images": len(train) + len(val),
        "history": [{"epoch": 0, "elapsed_s": seconds, "value": best}],
        "features_cpu_s": features_cpu_s,
        "search_cpu_s": cpu_s() - features_cpu_s,
        "scale": scale,
        "C": float(CS[number]),
        "cross_validated": cross_validated,
    }


def main() -> None:
    """Run once from the command line and print the result as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--float32", action="store_true", help="even where there is bfloat16")
    parser.add_argument("--scores", type=Path, help="written: what it says of every image of val")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    print(json.dumps(run(args), indent=1))


if __name__ == "__main__":
    main()
