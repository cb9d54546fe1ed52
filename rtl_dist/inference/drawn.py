"""Predictions as pictures: a grid of the first ones, and where each comes from."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from rtl_dist.core.errors import UserError, disk_refused
from rtl_dist.core.files import write_bytes
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.inference.heatmaps import Heatmaps, heatmaps
from rtl_dist.inference.pictures import (
    MOST_CELLS,
    Cell,
    grid,
    picture_of,
    png_of,
    with_heatmap,
)
from rtl_dist.inference.prediction import Prediction
from rtl_dist.inference.predictor import Predicting, Predictor

LOG = logging.getLogger("rtl_dist")
_TOLD = 2  # classes below a picture
_OURS = re.compile(r"\d{8}-.*\.png(\..*)?")
_MOST_OF_NAME = 80


def grid_of(
    predictions: Sequence[Prediction], images: torch.Tensor, *, total: int, title: str
) -> bytes:
    """A PNG of the first 64 predictions, each below what the network saw.

    Args:
        images: uint8 (N, C, S, S), of the predictions.
        total: how many there are in all, which the title says where they are more.
    """
    shown = list(zip(predictions, images, strict=True))[:MOST_CELLS]
    counted = f": the first {len(shown)} of {total:,} inputs" if total > len(shown) else ""
    cells = [
        Cell(picture=None if each.error else picture_of(image), lines=lines_of(each))
        for each, image in shown
    ]
    return png_of(grid(cells, title=f"{title}{counted}"))


def lines_of(prediction: Prediction) -> list[str]:
    """What stands below a picture: the answer (with a question mark where the model abstains), what
    else it may be, and the input."""
    name = "/".join(prediction.source.split("/")[-2:])
    if prediction.error is not None:
        return ["no prediction", prediction.error, name]
    if prediction.task == MULTI_LABEL:
        told = [(label, prediction.of(label) or 0.0) for label in prediction.labels]
        told.sort(key=lambda each: -each[1])
        others = [each for each in prediction.top(_TOLD) if each not in told]
        first = ", ".join(f"{label} {100 * share:.0f} %" for label, share in told) or "no label"
    else:
        (label, share), *others = prediction.top(_TOLD)
        first = f"{label}{'?' if prediction.abstained else ''}  {100 * share:.1f} %"
    rest = ", ".join(f"{label} {100 * share:.1f} %" for label, share in others)
    return [first, rest, name]


class Explainer:
    """Writes a picture an input into a folder: what the network saw, and beside it where the most
    probable class's score comes from. Inputs that cannot be read have none."""

    def __init__(self, folder: Path, predictor: Predicting) -> None:
        """
        Raises:
            UserError: no heatmaps can be made of what was exported; or the folder cannot be
                written, or holds something else.
        """
        self._folder, self._predictor = folder, with_layers(predictor)
        self._is_told = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            strange = [name for name in os.listdir(folder) if not _OURS.fullmatch(name)]
        except OSError as error:
            raise UserError(
                f"--explain: cannot write into {folder}: {error.strerror}; choose another folder"
            ) from error
        if strange:
            raise UserError(
                f"--explain: {folder} holds {min(strange)}, which is none of ours; choose another"
                " folder"
            )

    def write(self, first: int, predictions: Sequence[Prediction], images: torch.Tensor) -> None:
        """Pictures of the inputs from number ``first`` on.

        Args:
            images: uint8 (N, C, S, S), of the predictions.

        Raises:
            UserError: the network is one of which no heatmap can be made.
            RtlDistError: the folder cannot be written.
        """
        places = [n for n, each in enumerate(predictions) if each.probabilities is not None]
        if not places:
            return
        numbers = [_most_probable(predictions[place]) for place in places]
        found = explained(self._predictor, images[places], numbers)
        self._tell(found)
        for row, place in enumerate(places):
            prediction, picture = predictions[place], picture_of(images[place])
            laid = with_heatmap(picture, found.spread[row])
            path = self._folder / f"{first + place:08d}-{_name_of(prediction.source)}.png"
            try:
                write_bytes(path, _page(prediction, picture, laid))
            except OSError as error:
                raise disk_refused(error, path) from error

    def _tell(self, found: Heatmaps) -> None:
        if self._is_told:
            return
        self._is_told = True
        what = (
            "class activation maps: their mean and the head's bias are the score"
            if found.exact.all()
            else "gradient times activation: they show where the score reacts, but do not add up to"
            " it, as this network does more than pool behind it"
        )
        LOG.info("heatmaps of layer %s, %s", found.layer, what)


def with_layers(predictor: Predicting) -> Predictor:
    """The predictor, of which heatmaps can be made.

    Raises:
        UserError: none can: it is of what was exported.
    """
    if not isinstance(predictor, Predictor) or not predictor.loaded.model.shows_layers:
        raise UserError(
            f"{predictor.source} was exported, and no heatmaps can be made of it; give the run or"
            " model folder that it was exported from"
        )
    return predictor


def explained(predictor: Predictor, images: torch.Tensor, numbers: Sequence[int]) -> Heatmaps:
    """The maps of classes, of a model that says one class against what speaks for all."""
    one = predictor.task != MULTI_LABEL
    return heatmaps(predictor.loaded.model, images, numbers, against_others=one)


def _page(prediction: Prediction, picture: Image.Image, laid: Image.Image) -> bytes:
    label = prediction.label
    lines = [*lines_of(prediction), f"orange speaks for {label}, blue against it"]
    return png_of(grid([Cell(picture=picture, heatmap=laid, lines=lines)]))


def _most_probable(prediction: Prediction) -> int:
    assert prediction.probabilities is not None
    return int(prediction.probabilities.argmax())


def _name_of(source: str) -> str:
    """The last part of an input's name, of letters that every disk takes."""
    last = re.split(r"[/\\]", source.rstrip("/"))[-1]
    stem = re.sub(r"\.\w{1,5}$", "", last.partition("?")[0])
    return re.sub(r"[^\w.-]", "_", stem, flags=re.ASCII)[:_MOST_OF_NAME] or "image"
