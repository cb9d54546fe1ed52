"""The speed of a GPU's steps: ours beside a bare loop, from memory and from JPEG shards."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from finetune_step import images_per_second
from gpu_findings import Finding
from gpu_place import TRAIN, Place, run
from PIL import Image
from spread import spread
from step_sides import NUM_CLASSES, Task, bare, ours

from rtl_dist.prepare.packing.pack import pack

WARM_UP_STEPS = 5
RATIO, H200_SPEED = 0.98, 6400.0
# What differs from BatchNorm frozen, no average, cudnn's deterministic kernels, as they are.
WAYS: dict[str, dict] = {
    "BatchNorm frozen": {},
    "BatchNorm train": {"batchnorm": "train"},
    "BatchNorm train, average": {"batchnorm": "train", "ema": 0.999},
    "cudnn.benchmark": {"benchmark": True},
    "compiled": {"compiled": True},
}


def steps(place: Place) -> Iterator[Finding]:
    """Images a second of whole steps on a batch in memory, in turn with a bare loop's."""
    ways = {"BatchNorm train": WAYS["BatchNorm train"]} if place.small else WAYS
    network, batch, size = ("resnet18", 2, 32) if place.small else ("resnet50", _batch(), 224)
    for name, way in ways.items():
        if place.left_s() <= 0:
            return
        speeds = _speeds(place, dict(way), network=network, batch=batch, size=size)
        ratios = [a / b for a, b in zip(*speeds, strict=True)]
        ratio = statistics.median(ratios)
        is_h200 = place.device == "cuda" and "H200" in torch.cuda.get_device_name()
        goal, ok = (f"{RATIO} of the bare loop", ratio >= RATIO)
        if is_h200 and name == "BatchNorm frozen":
            goal += f", {H200_SPEED:,.0f} images/s"
            ok = ok and statistics.median(speeds[0]) >= H200_SPEED
        if place.small:
            goal, ok = "", None
        yield Finding(
            check="speed",
            what=f"{network} at {size}, batch {batch}, {name}",
            found=f"{spread(speeds[0], 0)} images/s, {spread(ratios, 3)} of a bare loop's",
            goal=goal,
            ok=ok,
        )


def from_shards(place: Place) -> Iterator[Finding]:
    """Whole runs from JPEG shards: speed, the wait for data, cached activations or not."""
    count, side, num_steps = (24, 40, 4) if place.small else (2048, 256, 40)
    data = _jpeg_shards(place.folder / "jpegs", count, side)
    everything = {"trainable": "all", "batchnorm": "train"}
    top = {"trainable": "layer4+", "views": 1}
    kinds: dict[str, dict] = {
        "all": everything,
        "layer4+, cached": top | {"cache": "auto"},
        "layer4+, computed": top | {"cache": "off"},
    }
    for name, stage in kinds.items():
        if place.left_s() <= 0:
            return
        folder = place.folder / f"shards-{name.replace(', ', '-').replace('+', '')}"
        config = _config(place, data, folder, stage, num_steps)
        ended = run(TRAIN, "--config", str(config), limit_s=min(120, max(20, place.left_s())))
        rows = [row for row in _metrics(folder) if "speed/images_per_second" in row][1:]
        if not rows:
            yield Finding(check="shards", what=name, found=ended.last_words, ok=False)
            continue
        speed = statistics.median(row["speed/images_per_second"] for row in rows)
        wait = statistics.median(row["speed/data_wait"] for row in rows)
        yield Finding(
            check="shards",
            what=f"resnet50 at 224 from JPEG shards, training {name}" if not place.small else name,
            found=f"{speed:,.0f} images/s, {wait:.0%} of the time waiting for data",
        )


def _speeds(
    place: Place, way: dict, *, network: str, batch: int, size: int
) -> tuple[list[float], list[float]]:
    """Of ours and of the bare loop, round by round."""
    device, rounds = torch.device(place.device), 2 if place.small else 5
    benchmark = way.pop("benchmark", False)
    task = Task(
        images=torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device),
        labels=torch.randint(NUM_CLASSES, (batch,), device=device),
        device=device,
        network=network,
        **way,
    )
    speeds: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as opened:
        sides = [opened.enter_context(side(task)) for side in (ours, bare)]
        torch.backends.cudnn.benchmark = benchmark  # our runtime has just set it
        torch.backends.cudnn.deterministic = not benchmark
        for step in sides:
            images_per_second(step, task, 1 if place.small else WARM_UP_STEPS)
        for _ in range(rounds):
            for step, found in zip(sides, speeds, strict=True):
                found.append(images_per_second(step, task, 1 if place.small else 8))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return speeds


def _batch() -> int:
    """Images, of which two networks hold the activations in turn."""
    return 256 if torch.cuda.get_device_properties(0).total_memory > 30 * 2**30 else 64


def _jpeg_shards(folder: Path, count: int, side: int) -> Path:
    """Photographs as far as a decoder can tell: noise of several scales."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = [generator.integers(0, 256, (side // n, side // n, 3)) for n in (32, 8, 2)]
        pixels = sum(
            np.asarray(Image.fromarray(c.astype(np.uint8)).resize((side, side)), np.uint16)
            for c in coarse
        )
        path = folder / "images" / f"class-{number % NUM_CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels // len(coarse)).astype(np.uint8)).save(path, quality=85)
    pack(str(folder / "images"), folder / "data", val_fraction=0.2, show_progress=False)
    return folder / "data"


def _config(place: Place, data: Path, folder: Path, stage: dict, num_steps: int) -> Path:
    """JSON is YAML, too."""
    batch = {"global": 4, "micro": 2} if place.small else {"global": 256, "micro": "auto"}
    config = {
        "run": {"dir": str(folder), "log_every": f"{max(1, num_steps // 8)} steps"},
        "data": {"path": str(data), "image_size": 32 if place.small else 224},
        "model": {"name": "test_resnet" if place.small else "resnet50", "weights": "none"},
        "stages": [{"name": "speed", "steps": num_steps, "lr": 1e-4, **stage}],
        "batch": batch,
        "eval": {"every": f"{num_steps} steps"},
        "checkpoint": {"every": f"{num_steps} steps"},
        "features": {"cache_dir": str(place.folder / "features")},
        "track": {"wandb": "off"},
    }
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def _metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
