"""``torchvision:NAME``: public data sets, downloaded by torchvision and checked by its md5 sums.

Image files are passed through as published; data sets kept as arrays become PNG files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.text import did_you_mean
from rtl_dist.prepare.sources.items import Item, Source, single_label_source
from rtl_dist.prepare.splits import TEST, TRAIN, VAL

_Splits = dict[str, dict[str, Any]]
_BY_FLAG: _Splits = {TRAIN: {"train": True}, TEST: {"train": False}}
_TWO: _Splits = {TRAIN: {"split": "train"}, TEST: {"split": "test"}}
_THREE: _Splits = {name: {"split": name} for name in (TRAIN, VAL, TEST)}

# How each class of torchvision.datasets names its splits.
_SPLITS: dict[str, _Splits] = {
    "CIFAR10": _BY_FLAG,
    "CIFAR100": _BY_FLAG,
    "Country211": {**_THREE, VAL: {"split": "valid"}},
    "DTD": _THREE,
    "EMNIST": {name: {"split": "balanced", **flag} for name, flag in _BY_FLAG.items()},
    "EuroSAT": {TRAIN: {}},
    "FGVCAircraft": _THREE,
    "FashionMNIST": _BY_FLAG,
    "Flowers102": _THREE,
    "Food101": _TWO,
    "GTSRB": _TWO,
    "Imagenette": {TRAIN: {"split": "train"}, VAL: {"split": "val"}},
    "KMNIST": _BY_FLAG,
    "MNIST": _BY_FLAG,
    "OxfordIIITPet": {TRAIN: {"split": "trainval"}, TEST: {"split": "test"}},
    "RenderedSST2": _THREE,
    "STL10": _TWO,
    "SVHN": _TWO,
    "USPS": _BY_FLAG,
}


def read_public(name: str, labels: Sequence[str] | None) -> Source:
    """Downloads what is not there yet, and lists every split torchvision knows of it.

    Raises:
        UserError: torchvision's ``name`` is not one that can be packed.
        DataError: the download failed.
    """
    if name not in _SPLITS:
        hint = did_you_mean(name, _SPLITS, "{!r}") or ";"
        raise UserError(f"no data set torchvision:{name}{hint} there are: {', '.join(_SPLITS)}")
    from torchvision import datasets  # slow to import, and only this source needs it

    root = downloads_folder() / name
    root.mkdir(parents=True, exist_ok=True)
    classes: list[str] | None = None
    numbered: list[tuple[Item, int]] = []
    for split, options in _SPLITS[name].items():
        try:
            dataset = getattr(datasets, name)(root=str(root), download=True, **options)
        # URLError, timeouts and full disks are OSErrors, failed md5 sums RuntimeErrors
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"cannot get torchvision:{name} into {root}: {str(error) or repr(error)}; check the"
                f" network and the disk, or put the files there yourself, and pack again"
            ) from error
        classes = classes or _class_names(dataset)
        for i, (image, label) in enumerate(_samples(dataset)):
            numbered.append((_item(split, i, image, root), int(label)))
    if classes is None:
        classes = [str(number) for number in range(max(label for _, label in numbered) + 1)]
    named = [(item, classes[label]) for item, label in numbered]
    return single_label_source(root, named, labels, classes=classes)


def downloads_folder() -> Path:
    """``$TORCH_HOME/datasets``, by default ``~/.cache/torch/datasets``."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    torch_home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(torch_home).expanduser() / "datasets"


def _samples(dataset: Any) -> Iterable[tuple[Any, Any]]:
    """(path or pixels, class number) of each sample, without decoding anything.

    torchvision's data sets have no common way to ask this; these are the few ways they have.
    """
    for attribute in ("_samples", "samples"):
        if hasattr(dataset, attribute):
            return list(getattr(dataset, attribute))
    labels = next(
        getattr(dataset, attribute)
        for attribute in ("_labels", "targets", "labels")
        if hasattr(dataset, attribute)
    )
    for attribute in ("_image_files", "_images"):
        if hasattr(dataset, attribute):
            return zip(getattr(dataset, attribute), labels, strict=True)
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 4 and pixels.shape[1] == 3:  # SVHN and STL10 keep channels first
        pixels = pixels.transpose(0, 2, 3, 1)
    return zip(pixels, labels, strict=True)


def _class_names(dataset: Any) -> list[str] | None:
    """None where the data set only numbers its classes. Imagenette gives synonyms: the first."""
    names = getattr(dataset, "classes", None)
    return names and [name if isinstance(name, str) else name[0] for name in names]


def _item(split: str, i: int, image: Any, root: Path) -> Item:
    if isinstance(image, np.ndarray):
        return Item(f"{split}/{i:07d}", split, (), image)
    return Item(Path(image).relative_to(root).as_posix(), split, ())
