"""Which images an export is checked on: those that are named, or those of the run's own data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rtl_dist.config import read_run_config
from rtl_dist.core.errors import UserError
from rtl_dist.core.urls import Redirects, is_url
from rtl_dist.data.format.dataset import Dataset, open_dataset
from rtl_dist.data.format.description import DESCRIPTION
from rtl_dist.evaluation.same_classes import require_same_classes
from rtl_dist.inference.export.real_images import (
    RealImages,
    images_of_folder,
    images_of_split,
)
from rtl_dist.model.folder import LoadedModel


@dataclass(frozen=True, kw_only=True)
class CheckedOn:
    """As the command is given it."""

    data: str | None
    """Folder or URL of a data set; None: that of the run, unless there are ``images``."""
    split: str | None
    """Of the data set; None: that by which models are judged."""
    images: Path | None
    """A folder of images without labels."""
    most: int
    """Images at most."""
    redirects: Redirects = "origin"
    """Of a data set behind a URL."""

    def open_dataset(self, model_path: str, loaded: LoadedModel) -> Dataset | None:
        """None where there is none, but images.

        Raises:
            UserError: both are given or neither can be found, or the classes are others.
            DataError: there is no such data set, or it is damaged.
        """
        if self.images is not None:
            if self.data is not None or self.split is not None:
                raise UserError("--images goes with neither --data nor --split: give one of them")
            return None
        path = self.data or _data_of_run(model_path)
        dataset = open_dataset(path, redirects=self.redirects)
        require_same_classes(loaded, dataset)
        return dataset

    def find(self, dataset: Dataset | None) -> RealImages:
        """
        Raises:
            UserError, DataError: see ``images_of_folder`` and ``images_of_split``.
        """
        if dataset is None:
            assert self.images is not None
            return images_of_folder(self.images, self.most)
        split = self.split or dataset.judging_split
        return images_of_split(dataset.split(split), dataset.where, self.most)


def _data_of_run(model_path: str) -> str:
    given = Path(model_path)
    for run in (given, given.parent, given.parent.parent):
        if (run / "config.yaml").is_file():
            path = read_run_config(run).data.path
            if is_url(path) or (Path(path) / DESCRIPTION).exists():
                return path
    raise UserError(
        "an export is checked on real images before it is written: give --data DATASET or --images"
        " FOLDER"
    )
