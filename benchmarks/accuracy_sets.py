"""The data sets of accuracy.py, each brought to the same shape: a folder that every method reads.

Single-label sets become ``<split>/<class>/<stem>.<suffix>``, multi-label ones ``train.csv`` and
``val.csv`` with the images beside them; the splits are ``train`` and ``val``. A stem stands for one
image whatever the split, also in the keys of a packed data set, so that what a method says of an
image can be told by it. ``set.json`` beside them holds the truth. Images are byte for byte the
publisher's; GIFs are left out, which some methods would read and others not.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from accuracy_sources import (
    Picture,
    Published,
    cifar10,
    folder_reader,
    long_tail,
    read_digits_as_files,
    read_monkeys,
    read_scenes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set as published, or a part of one.

    read: the folder of all data and a seed, to the classes' names and the images.
    image_size: of the network's input, unless the command line says another.
    by_seed: whether the seed draws the training images.
    is_tiny: judged with the quickstart's tiny backbone and config, not as photographs.
    """

    read: Callable[[Path, int], Published]
    image_size: int = 224
    by_seed: bool = False
    is_multi_label: bool = False
    is_tiny: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A set in the shape that all methods read.

    labels: class numbers of each validation image, by its stem.
    near_copies: stems of validation images that are near copies of training images.
    num_train: images.
    """

    name: str
    folder: Path
    image_size: int
    is_multi_label: bool
    is_tiny: bool
    classes: tuple[str, ...]
    num_train: int
    labels: dict[str, tuple[int, ...]]
    near_copies: frozenset[str]

    @property
    def metric(self) -> str:
        return "map" if self.is_multi_label else "top1"


def prepare(name: str, data: Path, seed: int, work: Path, image_size: int | None) -> Prepared:
    """Lays a set out below ``work``, or finds it there.

    Args:
        data: the folder that holds all sets as published.
        image_size: of photographs; None: the set's own.
    """
    dataset = SETS[name]
    folder = work / (f"{name}-{seed}" if dataset.by_seed else name)
    if not folder.exists():
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        classes, pictures = dataset.read(data, seed)
        _write(new, classes, pictures, is_multi_label=dataset.is_multi_label)
        new.rename(folder)
    told = json.loads((folder / "set.json").read_text())
    return Prepared(
        name=name,
        folder=folder,
        image_size=dataset.image_size if dataset.is_tiny or not image_size else image_size,
        is_multi_label=dataset.is_multi_label,
        is_tiny=dataset.is_tiny,
        classes=tuple(told["classes"]),
        num_train=told["num_train"],
        labels={stem: tuple(labels) for stem, labels in told["val"].items()},
        near_copies=frozenset(told["near_copies"]),
    )


def _write(
    folder: Path, classes: list[str], pictures: list[Picture], *, is_multi_label: bool
) -> None:
    rows: dict[str, list[list[str | int]]] = {"train": [], "val": []}
    stems = {}
    for number, picture in enumerate(pictures):
        stem = picture.stem or f"{picture.split}{number:05d}"
        stems[stem] = picture
        parent = (
            picture.split if is_multi_label else f"{picture.split}/{classes[picture.labels[0]]}"
        )
        file = folder / parent / (stem + Path(picture.name).suffix.lower())
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.content)
        has = [int(i in picture.labels) for i in range(len(classes))]
        rows[picture.split].append([file.relative_to(folder).as_posix(), *has])
    for split, lines in rows.items() if is_multi_label else ():
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as table:
            csv.writer(table).writerows([["file", *classes], *lines])
    val = {stem: picture for stem, picture in stems.items() if picture.split == "val"}
    told = {
        "classes": classes,
        "num_train": len(pictures) - len(val),
        "val": {stem: picture.labels for stem, picture in val.items()},
        "near_copies": [stem for stem, picture in val.items() if picture.is_near_copy],
        "names": {stem: picture.name for stem, picture in stems.items()},
    }
    (folder / "set.json").write_text(json.dumps(told, indent=1))


SETS = {
    "hymenoptera": DataSet(read=folder_reader("hymenoptera")),
    "imagenette-mini": DataSet(read=folder_reader("imagenette-mini")),
    "monkey10": DataSet(read=read_monkeys),
    **{
        f"cifar10-{n}": DataSet(read=cifar10(lambda place, n=n: n), image_size=96, by_seed=True)
        for n in (10, 100, 1000)
    },
    **{
        f"cifar10-lt{ratio}": DataSet(read=cifar10(long_tail(ratio)), image_size=96, by_seed=True)
        for ratio in (3, 10, 100)
    },
    "miml_scene": DataSet(read=read_scenes, is_multi_label=True),
    "digits": DataSet(read=read_digits_as_files, image_size=32, is_tiny=True),
}
