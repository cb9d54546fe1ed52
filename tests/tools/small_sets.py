"""Small packed data sets, and damage to them, for the tests of what reads them."""

from pathlib import Path
from typing import Any

from pack_images import class_folders

from rtl_dist.data.format.dataset import Dataset, open_dataset
from rtl_dist.data.format.split import Split
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
