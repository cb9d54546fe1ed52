"""The images by which an export is checked: real ones, and what people's cameras make of such."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.decode import decode
from rtl_dist.prepare.conversion import as_readable
from rtl_dist.prepare.image_file import may_be_image, read_image_file
from rtl_dist.prepare.sources.walk import walk

LEAST = 200
"""Real images that a check must see, or all there are."""
_ORIENTATION = 0x0112  # the tag of EXIF
_ODD_SIZES = ((1, 1), (2, 3), (5, 301), (301, 7), (97, 101), (223, 225), (333, 500))


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Image files, and what is true of them."""

    names: tuple[str, ...]
    """For people."""
    files: tuple[bytes, ...]
    """As they are stored."""
    labels: np.ndarray | None
    """As ``Split.labels`` has them; None: nobody says."""
    source: str
    """Where they are from, for people, whoever's machine it is."""

    def __len__(self) -> int:
        return len(self.files)


def images_of_split(split: Split, where: str, most: int) -> RealImages:
    """At most ``most`` images, evenly spread over the split.

    Raises:
        DataError: one of them is damaged.
    """
    samples = np.unique(
        np.linspace(0, split.num_samples - 1, min(most, split.num_samples)).round().astype(np.int64)
    )
    reader = SampleReader(split)
    files = tuple(reader.read(int(sample)) for sample in samples)
    reader.close()
    return RealImages(
        names=tuple(split.name_of(int(sample)) for sample in samples),
        files=files,
        labels=split.labels(samples),
        source=f"split {split.name} of {where.rstrip('/').rpartition('/')[2]}",
    )


def images_of_folder(folder: Path, most: int) -> RealImages:
    """At most ``most`` of the images below a folder, evenly spread.

    Raises:
        UserError: there is no such folder, or no image in it.
        DataError: one of them is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"--images: {folder} is no folder")
    paths = [path for path in walk(folder, folder).files if may_be_image(path)]
    if not paths:
        raise UserError(f"--images: {folder} holds no image")
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths)),
                                                      dtype=np.int64))]  # fmt: skip
    files = []
    for path in chosen:
        try:
            files.append(as_readable(read_image_file(path, convert=True)))
        except DataError as error:
            raise DataError(f"--images: {path} {error}; mend or remove it") from error
    return RealImages(
        names=tuple(str(path.relative_to(folder)) for path in chosen),
        files=tuple(files),
        labels=None,
        source=folder.absolute().name,
    )


def odd_sizes(images: RealImages, channels: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Cuttings of real images, of sizes that shapes and roundings stumble over; what they are, and
    uint8 (channels, height, width)."""
    for i, (height, width) in enumerate(_ODD_SIZES):
        name, content = images.names[i % len(images)], images.files[i % len(images)]
        pixels = decode(content, channels)
        rows = torch.arange(height) % pixels.shape[1]
        columns = torch.arange(width) % pixels.shape[2]
        yield f"{name} as {width} x {height}", pixels[:, rows][:, :, columns]


def as_cameras_store(images: RealImages) -> Iterator[tuple[str, bytes]]:
    """Real images as grey files, and turned as EXIF says; what they are, and a JPEG's bytes."""
    for i, content in enumerate(images.files[:2]):
        picture = Image.fromarray(decode(content, 3).permute(1, 2, 0).numpy())
        yield f"{images.names[i]} in grey", _jpeg(picture.convert("L"), None)
    for orientation in range(2, 9):
        i = orientation % len(images)
        picture = Image.fromarray(decode(images.files[i], 3).permute(1, 2, 0).numpy())
        turned = _jpeg(picture, orientation)
        yield f"{images.names[i]} with EXIF orientation {orientation}", turned


def _jpeg(picture: Image.Image, orientation: int | None) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[_ORIENTATION] = orientation
    picture.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()
