"""A data set and a config small enough to train on in a second, for the tests of whole runs."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.train import main
from rtl_dist.training.stage_trainer import StageTrainer
from rtl_dist.training.step_boundary import StepBoundary

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("blue", "green", "red")
TENSORS = ("model", "optimizer", "ema", "stage_best")
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


def make_dataset(folder: Path, *, val: int = 21) -> Path:
    """Packs 57 training, 21 validation and 15 test images, three classes; returns the data set."""
    images = write_images(folder / "images", {"train": 19, "val": val // 3, "test": 5})
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


def train(tmp_path: Path, dataset: Path, name: str = "run", code: int = 0, **changes: Any) -> Path:
    """Trains ``tiny_config`` in this process, which must end with ``code``; returns the run."""
    run = tmp_path / name
    config = write_config(tmp_path / f"{name}.yaml", tiny_config(dataset, run, **changes))
    assert main(["--config", config]) == code
    return run


def require_equal_runs(one: Path, other: Path, *, ledger: bool = True) -> None:
    """Two finished runs left the same bytes: every checkpoint, the best weights, the ledger; and
    the same metrics and results, but for what a clock measured."""
    names = [
        sorted(path.name for path in (run / "checkpoints").glob("step-*")) for run in (one, other)
    ]
    # a run that was killed as it deleted older ones still has them
    assert names[0] == names[1][-len(names[0]) :]
    files = [f"checkpoints/{name}/{kind}.safetensors" for name in names[0] for kind in TENSORS]
    files += ["best/model.safetensors", "best/config.json"]
    if ledger and (one / "ledger").exists():
        files.append("ledger/samples.jsonl")
    for name in files:
        assert filecmp.cmp(one / name, other / name, shallow=False), name
    for name in names[0]:
        contents = [untimed_state(run / "checkpoints" / name) for run in (one, other)]
        assert contents[0] == contents[1], name
    assert metric_rows(one) == metric_rows(other)
    untimed = [{k: v for k, v in results(run).items() if k != "elapsed_s"} for run in (one, other)]
    assert untimed[0] == untimed[1]


def untimed_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` without what a clock measured, or what depends on it."""
    content = json.loads((checkpoint / "state.json").read_text())
    for name in ("elapsed_s", "metrics_bytes", "ledger_bytes", "wandb_id"):
        content["state"].pop(name, None)
    return content


def weights(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint."""
    return load_file(newest_checkpoint(run) / f"{name}.safetensors")


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors in the checkpoint of a step."""
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


class Killed(BaseException):
    """Stands for a process that ends at once: nothing may catch it to tidy up."""


@contextmanager
def killed_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run within the block must end at that step, when all that is due then is done."""
    cross = StepBoundary.cross

    def cross_and_die(self, outcome):
        cross(self, outcome)
        if self._run.state.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StepBoundary, "cross", cross_and_die)
        with pytest.raises(Killed):
            yield


def scale_loss(monkeypatch: pytest.MonkeyPatch, factor: Callable[[int, int], float]) -> None:
    """Multiplies the training loss by ``factor(step, microbatch)``."""
    learn_from = StageTrainer.learn_from

    def learn(self, batch, microbatch, per_rank, *, shares):
        loss, scale = self._loss, factor(self._run.state.step, microbatch)
        self._loss = lambda scores, labels: loss(scores, labels) * scale
        try:
            return learn_from(self, batch, microbatch, per_rank, shares=shares)
        finally:
            self._loss = loss

    monkeypatch.setattr(StageTrainer, "learn_from", learn)


def train_process(config: str, *overrides: str, env: dict[str, str] | None = None) -> Any:
    """``python rtl_dist/train.py`` in a process of its own, output captured."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "rtl_dist" / "train.py"), "--config", config, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
