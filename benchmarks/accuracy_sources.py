"""The data sets of accuracy.py as their publishers left them: classes and images."""

from __future__ import annotations

import csv
import dataclasses
import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from near_copies import near_copies
from PIL import Image

from rtl_dist.prepare.sources.digits import read_digits

SUFFIXES = (".jpg", ".jpeg", ".png")
CIFAR_VAL_PER_CLASS = 200
LONG_TAIL_MOST = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One image.

    split: ``train`` or ``val``.
    labels: class numbers; exactly one but in multi-label data.
    name: the publisher's, relative to where the set lies.
    stem: of its file in the common shape; None: one is made of split and number.
    is_near_copy: of a training image, where the set is looked through for those.
    """

    split: str
    labels: tuple[int, ...]
    name: str
    content: bytes
    stem: str | None = None
    is_near_copy: bool = False


Published = tuple[list[str], list[Picture]]
"""The classes' names and the images."""


def class_folders(files: Iterable[tuple[str, bytes]]) -> Published:
    """Of (``<split>/<class>/<file>``, content)."""
    found = sorted((name, content) for name, content in files if _is_image(name))
    classes = sorted({name.split("/")[1] for name, _ in found})
    pictures = []
    for name, content in found:
        split, label, _ = name.split("/")
        pictures.append(
            Picture(split=split, labels=(classes.index(label),), name=name, content=content)
        )
    return classes, pictures


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def folder_reader(name: str) -> Callable[[Path, int], Published]:
    def read(data: Path, seed: int) -> Published:
        root = data / name
        files = [path for path in root.glob("*/*/*") if path.is_file()]
        return class_folders((p.relative_to(root).as_posix(), p.read_bytes()) for p in files)

    return read


def _members(archive: Path, wanted: Callable[[str], bool] = _is_image) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and wanted(m.name)}  # type: ignore[union-attr]


def read_monkeys(data: Path, seed: int) -> Published:
    classes, pictures = class_folders(_members(data / "monkey10.tar.gz").items())
    train, val = ([p for p in pictures if p.split == split] for split in ("train", "val"))
    copies = near_copies([p.content for p in val], [p.content for p in train])
    marked = [dataclasses.replace(p, is_near_copy=c) for p, c in zip(val, copies, strict=True)]
    return classes, train + marked


def cifar10(per_class: Callable[[int], int]) -> Callable[[Path, int], Published]:
    """``per_class``: how many training images the class at a place gets, the places 0 to 9 being
    dealt to the classes by the seed. Validation images are always the same 2,000 of ``test``."""

    def read(data: Path, seed: int) -> Published:
        archive = data / "cifar10.tar.gz"
        with tarfile.open(archive) as tar:
            names = sorted(m.name for m in tar if m.isfile() and _is_image(m.name))
        classes = sorted({name.split("/")[1] for name in names})
        draw, places = np.random.default_rng(seed), {}
        for place, number in enumerate(draw.permutation(len(classes))):
            places[classes[number]] = place
        chosen: set[str] = set()
        for label in classes:
            train, test = (
                [n for n in names if n.startswith(f"{s}/{label}/")] for s in ("train", "test")
            )
            chosen.update(draw.choice(train, per_class(places[label]), replace=False).tolist())
            fixed = np.random.default_rng(0).choice(test, CIFAR_VAL_PER_CLASS, replace=False)
            chosen.update(fixed.tolist())
        files = _members(archive, chosen.__contains__)
        return class_folders((n.replace("test/", "val/", 1), c) for n, c in files.items())

    return read


def long_tail(ratio: int) -> Callable[[int], int]:
    """Exponential, from 1,000 images of the largest class to 1,000 / ratio of the smallest."""
    return lambda place: round(LONG_TAIL_MOST * ratio ** (-place / 9))


def read_scenes(data: Path, seed: int) -> Published:
    root, pictures, classes = data / "miml_scene", [], []
    for split in ("train", "val"):
        with open(root / f"{split}.csv", newline="", encoding="utf-8") as table:
            (_, *classes), *rows = csv.reader(table)
        for name, *has in rows:
            labels = tuple(i for i, cell in enumerate(has) if cell == "1")
            content = (root / name).read_bytes()
            pictures.append(Picture(split=split, labels=labels, name=name, content=content))
    return classes, pictures


def read_digits_as_files(data: Path, seed: int) -> Published:
    """Train and val of ``rtl-dist pack digits``, as PNGs; its test split is for nobody here."""
    source, pictures = read_digits(None), []
    for item in sorted(source.items, key=lambda item: item.name):
        if item.split != "test":
            file = io.BytesIO()
            Image.fromarray(item.read(Path())).save(file, "PNG")
            pictures.append(
                Picture(
                    split=item.split,
                    labels=item.labels,
                    name=f"{item.name}.png",
                    stem=Path(item.name).name,  # as in the keys of `rtl-dist pack digits`
                    content=file.getvalue(),
                )
            )
    return list(source.classes), pictures
