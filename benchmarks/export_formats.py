"""One model in all formats of ``rtl-dist export``: size, accuracy, time an image, distance.

Each is exported, which checks and times it, one decoded image at a time; then all are timed in
turns, in batches of 64 views, on the CPU:

    python benchmarks/export_formats.py RUN --data DATASET [--split val] [--limit 200] [--rounds 3]

Without RUN a model without training and generated images stand in: the table's form, no figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rtl_dist.cli import main as rtl_dist
from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.inference.export.exported import open_model
from rtl_dist.model.build import make_classifier
from rtl_dist.model.folder import LoadedModel, write_loaded

FORMATS = {
    "onnx": ("--format", "onnx"),
    "onnx int8": ("--format", "onnx", "--int8", "--int8-loss", "1"),
    "pt2": ("--format", "pt2"),
    "timm": ("--format", "timm"),
    "hf": ("--format", "hf"),
}
BATCH = 64


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", default="200")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", default=",".join(FORMATS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = asked.run, asked.data
        if model is None:
            model, data = stand_ins(folder)
        words = ["--data", data, "--split", asked.split, "--limit", asked.limit, "--json"]
        rows, exports = {}, {"model": open_model(model)}
        for number, kind in enumerate(asked.formats.split(",")):
            out = folder / str(number)
            if rtl_dist(["export", model, *FORMATS[kind], "--out", str(out), *words]):
                raise SystemExit(f"{kind} could not be exported")
            rows[kind] = json.loads((out / "export.json").read_text())["formats"]
            exports[kind] = open_model(out)
        times = batch_times(exports, asked.rounds)
    shown = {"model": next(iter(rows.values()))[0]} | {kind: row[-1] for kind, row in rows.items()}
    heads = ("MB", "accuracy", "ms an image", "in batches", "distance")
    print(f"{'':10}", *(f"{head:>11}" for head in heads))
    for kind, row in shown.items():
        print(
            f"{kind:10} {row['size'] / 1e6:>11.1f} {row['metric']:>11.4f}"
            f" {row['ms_an_image']:>11.1f} {times[kind]:>11.1f} {row['max_difference'] or 0:>11.1e}"
        )


@torch.inference_mode()
def batch_times(models: dict[str, LoadedModel], rounds: int) -> dict[str, float]:
    """Milliseconds an image, medians of rounds in which each takes its turn."""
    found: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds + 1):  # the first makes plans
        for kind, loaded in models.items():
            view = loaded.model.preprocessing
            shape = (BATCH, view.channels, view.image_size, view.image_size)
            images = torch.randint(0, 256, shape).to(torch.uint8)
            begun = time.perf_counter()
            loaded.model.eval()(images)
            found[kind].append(1000 * (time.perf_counter() - begun) / BATCH)
    return {kind: statistics.median(each[1:]) for kind, each in found.items()}


def stand_ins(folder: Path) -> tuple[str, str]:
    """A model folder and a data set."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ants", "bees"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{number}.png")
    rtl_dist(["pack", str(folder / "images"), str(folder / "data"), "--workers", "1"])
    network = ModelConfig(name="test_resnet", weights="none")
    model = make_classifier(network, DataConfig(path="", image_size=32), num_classes=2, seed=0)
    loaded = LoadedModel(
        model=model.eval(),
        classes=("ants", "bees"),
        task=SINGLE_LABEL,
        dataset_fingerprint="generated",
        precision="no",
        source=folder / "model",
        network=network,
    )
    (folder / "model").mkdir()
    write_loaded(folder / "model", loaded)
    return str(folder / "model"), str(folder / "data")


if __name__ == "__main__":
    main()
