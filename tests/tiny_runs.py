"""A data set and a config small enough to train on in a second, for the tests of whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from rtl_dist.data.dataset import open_dataset
from rtl_dist.data.pack import pack

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("blue", "green", "red")
TIMING_KEYS = ("elapsed_s", "speed/images_per_second", "speed/data_wait")


def write_images(folder: Path, counts: dict[str, int], *, size: int = 16, seed: int = 0) -> Path:
    """Noisy pictures of one colour a class, PNG, as ``folder/<split>/<class>/<n>.png``."""
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        for channel, name in enumerate(reversed(CLASSES)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 160, (size, size, 3))
                pixels[..., channel] += 60
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(folder / split / name / f"{i:03d}.png")
    return folder


def make_dataset(folder: Path) -> Path:
    """Packs 57 training, 21 validation and 15 test images, three classes; returns the data set."""
    images = write_images(folder / "images", {"train": 19, "val": 7, "test": 5})
    pack(str(images), folder / "packed", shard_size=20, workers=1, show_progress=False)
    return folder / "packed"


def damage(dataset: Path, split: str, sample: int) -> None:
    """Flips one byte in the middle of a sample."""
    opened = open_dataset(dataset).split(split)
    row = opened.index[sample]
    path = dataset / opened.shards[row["shard"]].path
    content = bytearray(path.read_bytes())
    content[int(row["offset"]) + int(row["size"]) // 2] ^= 0xFF
    path.write_bytes(content)


def tiny_config(dataset: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Three stages of a small CNN, 20 steps of 16 images in 4 microbatches."""
    config = {
        "seed": 5,
        "run": {"dir": str(run), "log_every": "3 steps"},
        "data": {
            "path": str(dataset),
            "image_size": 16,
            "crop_pct": 1.0,
            "workers": 0,
            "test": None,
        },
        "model": {"name": "basic_cnn", "weights": "none", "dropout": 0.1},
        "stages": [
            {"name": "head", "steps": 6, "trainable": "head", "lr": 1e-2, "views": 2},
            {
                "name": "top",
                "steps": 6,
                "trainable": ["layer3", "head"],
                "lr": 1e-2,
                "batchnorm": "train",
            },
            {
                "name": "all",
                "steps": 8,
                "trainable": "all",
                "lr": 1e-2,
                "batchnorm": "train",
                "layer_decay": 0.8,
            },
        ],
        "batch": {"global": 16, "micro": 4},
        "precision": "no",
        "checkpoint": {"every": "4 steps"},
        "eval": {"every": "5 steps"},
        "track": {"wandb": "off"},
    }
    for path, value in changes.items():
        node: Any = config
        *parents, last = path.split("__")
        for name in parents:
            node = node.setdefault(name, {}) if isinstance(node, dict) else node[int(name)]
        node[last] = value
    return config


def write_config(path: Path, config: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def metric_rows(run: Path, *, timing: bool = False) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, without what a clock measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if timing:
        return rows
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


def newest_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def train_process(config: str, *overrides: str, env: dict[str, str] | None = None) -> Any:
    """``python rtl_dist/train.py`` in a process of its own, output captured."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "rtl_dist" / "train.py"), "--config", config, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
