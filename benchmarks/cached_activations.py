"""How long the thread that asks the device for its work is kept by a microbatch of activations.

    python benchmarks/cached_activations.py [--images 512] [--batch 64] [--row 1024 14 14]

A view of random activations (ResNet-50's, that go into layer4) lies in a file; microbatches of rows
in random order are read from it as a stage with cached features does, and used for a while by a
matrix product on one thread (``--use-ms``). Sides take turns, round by round; printed is the CPU
time of the asking thread, in ms a microbatch (median, lowest to highest), and the ratio:

  ours      rtl_dist's: a thread gathers the next rows into one of two buffers
  indexing  what it was: rows indexed out of a map of the file, put together, and turned to
            channels-last, by the thread that asks
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from spread import spread

from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.split import Split
from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.features.ahead import batches_ahead
from rtl_dist.features.microbatches import ViewMicrobatches
from rtl_dist.features.view import View
from rtl_dist.prepare.packing.pack import pack

CPU = torch.device("cpu")


def make_split(folder: Path, count: int) -> Split:
    """Of black images, which nobody looks at."""
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count // 2):
            Image.new("L", (8, 8), i % 256).save(folder / "images" / name / f"{i}.png")
    options = {"workers": 1, "show_progress": False, "val_fraction": 0.0}
    pack(str(folder / "images"), folder / "data", **options)
    return open_dataset(folder / "data").split("train")


def mapped_view(path: Path, count: int, row: tuple[int, ...], *, channels_last: bool) -> View:
    """Random bfloat16 activations of this shape, as they were stored or as they are."""
    channels, height, width = row
    stored = (count, height, width, channels) if channels_last else (count, *row)
    values = torch.randn(stored).to(torch.bfloat16)
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    raw = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    features = raw.view(torch.bfloat16).view(stored)
    if channels_last:
        features = features.permute(0, 3, 1, 2)
    return View(features=features, used=torch.arange(count), bad=[])


def indexing(cached: ViewMicrobatches, positions: range) -> Iterator[torch.Tensor]:
    """The inputs of each microbatch, by the thread that asks."""
    for position in positions:
        samples, _ = cached.order.samples_at(position, cached.size)
        features = cached.views[0].features[torch.from_numpy(samples)]
        inputs = features.new_empty(features.shape)
        inputs[torch.ones(len(samples), dtype=torch.bool)] = features
        yield inputs.contiguous(memory_format=torch.channels_last)


def ours(cached: ViewMicrobatches, positions: range) -> Iterator[torch.Tensor]:
    """The same by ``batches_ahead``."""
    for batch in batches_ahead(cached, positions, device=CPU):
        yield batch.inputs


def asking_ms(inputs: Iterator[torch.Tensor], use_s: float) -> float:
    """CPU milliseconds of this thread a microbatch, its use left out."""
    matrix = torch.randn(256, 256)
    asked_s, count = 0.0, 0
    while True:
        started_at = time.thread_time()
        if next(inputs, None) is None:
            return asked_s * 1e3 / count
        asked_s += time.thread_time() - started_at
        count += 1
        used_until = time.perf_counter() + use_s
        while time.perf_counter() < used_until:
            matrix @ matrix


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--row", type=int, nargs=3, default=[1024, 14, 14])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--use-ms", type=float, default=100.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    row = tuple(arguments.row)
    sides: dict[str, tuple[Callable[..., Iterator[torch.Tensor]], ViewMicrobatches]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = make_split(folder, arguments.images)
        order = EpochOrder(shard_sizes=split.shards.sizes(), seed=0)
        for side in (ours, indexing):
            view = mapped_view(
                folder / side.__name__, split.num_samples, row, channels_last=side is ours
            )
            cached = ViewMicrobatches(
                views={0: view}, num_views=1, order=order, split=split, size=arguments.batch
            )
            sides[side.__name__] = side, cached
        taken: dict[str, list[float]] = {side: [] for side in sides}
        positions = range(
            0, split.num_samples // arguments.batch * arguments.batch, arguments.batch
        )
        for _ in range(arguments.rounds):
            for side, (read, cached) in sides.items():
                taken[side].append(asking_ms(read(cached, positions), arguments.use_ms / 1e3))
    megabytes = arguments.batch * row[0] * row[1] * row[2] * 2 / 1e6
    print(f"torch {torch.__version__}, microbatches of {arguments.batch}, {megabytes:.0f} MB")
    for side, values in taken.items():
        print(f"{side:10} {spread(values, 2)} ms")
    ratios = [a / b for a, b in zip(taken["ours"], taken["indexing"], strict=True)]
    print(f"ours / indexing: {spread(ratios, 4)}")


if __name__ == "__main__":
    main()
