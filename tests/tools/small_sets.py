"""Small packed data sets, and damage to them, for the tests of what reads them."""

from pathlib import Path
from typing import Any

from pack_images import class_folders

from rtl_dist.data.format.dataset import Dataset, open_dataset
from rtl_dist.data.format.split import Split
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.data.order.windows import WindowOrder
from rtl_dist.prepare.packing.pack import pack


def packed(
    root: Path, counts: dict[str, int], *, shard_size: int = 7, kind: str = "JPEG"
) -> Dataset:
    """Generated images, ``counts`` of them by folder (``train/ants``), packed below ``root``."""
    class_folders(root / "images", counts, kind)
    pack(
        str(root / "images"),
        root / "packed",
        shard_size=shard_size,
        workers=1,
        show_progress=False,
        allow_missing_classes=True,
    )
    return open_dataset(root / "packed")


def order_of(split: Split, *, seed: int = 0, window: int | None = None) -> TrainingStream:
    """The full shuffle of a split, or with ``window`` that within windows of its shards."""
    sizes = split.shards.sizes()
    if window is None:
        return EpochOrder(shard_sizes=sizes, seed=seed)
    return WindowOrder(shard_sizes=sizes, seed=seed, window=window)


def flip_byte(split: Split, sample: int) -> None:
    """Changes one byte in the middle of a sample's image, in its shard on disk."""
    row = split.index[sample]
    path = split.shard_path(row["shard"])
    with open(path, "r+b") as tar:
        tar.seek(int(row["offset"]) + int(row["size"]) // 2)
        byte = tar.read(1)[0]
        tar.seek(-1, 1)
        tar.write(bytes([byte ^ 0x55]))


class Canary:
    """Unpickling it writes a file, which shows that something was executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")
