"""A trained model in Python: what ``rtl_dist.load`` gives."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL, Task
from rtl_dist.core.text import did_you_mean
from rtl_dist.data.loading.blocks import EVAL_BLOCK
from rtl_dist.distributed.precision import kernels_set_back, set_determinism, set_tf32
from rtl_dist.inference.drawn import explained, with_layers
from rtl_dist.inference.given import Given, ImageLike, given, is_one_image
from rtl_dist.inference.opening import open_predictor
from rtl_dist.inference.pictures import picture_of, png_of, with_heatmap
from rtl_dist.inference.prediction import Prediction, predictions_of
from rtl_dist.inference.predictor import Flips, Predicting, Predictor, fill_prepared

_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Where in an image the score of a class comes from; a notebook shows it as a picture."""

    source: str
    """What the image was given as."""
    label: str
    """The class."""
    heatmap: np.ndarray
    """float32 (h, w): what each place of the square that the network saw says of the class's score
    (single-label: less the mean of all classes'), which is their mean; above 0 it speaks for the
    class, below 0 against it."""
    exact: bool
    """Whether each value is the score of a picture that is everywhere as at that place; else it
    shows where the score reacts. See ``inference/heatmaps.py``."""
    picture: Image.Image
    """What the network saw, RGB."""

    def overlay(self) -> Image.Image:
        """The picture in grey under the map's colours: orange speaks for the class, blue against
        it."""
        return with_heatmap(self.picture, self.heatmap)

    def _repr_png_(self) -> bytes:
        return png_of(self.overlay())


class Model:
    """A trained model, ready: the same path from a file's bytes to probabilities as the commands'.

    Images are given as a path or URL, the bytes of an image file, a PIL image, an array uint8
    (H, W, 3) or (H, W), or a tensor uint8 (3 or 1, H, W); one, a list of them, or an iterator. An
    iterator is answered by an iterator, for which at most ``block`` images are held at a time.

    Of equal images in equal blocks the values are equal, bit by bit, to those of ``rtl-dist
    evaluate`` and ``predict``; in other blocks they are to rounding. Any thread may use it.
    """

    def __init__(self, path: str | Path, *, raw: bool = False, tta: Flips | None = None) -> None:
        """
        Args:
            path: a run folder (its best weights), a checkpoint folder, a model folder or an
                exported file.
            raw: whether its calibration is left out: probabilities as the network has them.
            tta: ``hflip``: the mean of an image's probabilities and those of its mirror image.

        Raises:
            UserError: it is none of these, or is damaged.
        """
        self.raw, self.tta = raw, tta
        self._predictor: Predicting = open_predictor(path, raw=raw, tta=tta)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names, in the order of the probabilities."""
        return self._predictor.classes

    @property
    def task(self) -> Task:
        """``single_label`` or ``multi_label``."""
        return self._predictor.task

    @property
    def source(self) -> Path:
        """The folder or file that it is from."""
        return self._predictor.source

    @property
    def image_size(self) -> int:
        """Side of the square that the network sees, in pixels."""
        return self._predictor.transform.image_size

    def __repr__(self) -> str:
        return f"Model({str(self.source)!r}: {self.task}, {len(self.classes):,} classes)"

    @overload
    def predict(  # type: ignore[overload-overlap]  # a path is a sequence of texts
        self, images: ImageLike, *, threshold: float | None = ..., block: int = ...
    ) -> Prediction: ...
    @overload
    def predict(  # type: ignore[overload-overlap]  # the first that fits is meant
        self, images: Sequence[ImageLike], *, threshold: float | None = ..., block: int = ...
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self, images: Iterable[ImageLike], *, threshold: float | None = ..., block: int = ...
    ) -> Iterator[Prediction]: ...
    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        threshold: float | None = None,
        block: int = EVAL_BLOCK,
    ) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """What the model says, in the order of the images.

        Args:
            images: one, a list or tuple, or an iterator.
            threshold: multi-label: from which probability on a label is given; None: the model's.
            block: images computed at a time, 1 or more. Of a camera's frames take 1, or the first
                answer waits for 64.

        Returns:
            of one image a ``Prediction``, of a list a list, of an iterator an iterator.

        Raises:
            DataError: one image alone cannot be read. Among several, its ``Prediction`` has the
                reason in ``error``, and no label.
            UserError: what was given is no image; says the cure.
        """
        if threshold is not None and (self.task != MULTI_LABEL or not 0 <= threshold <= 1):
            what = "is no probability" if self.task == MULTI_LABEL else "is for several labels"
            raise UserError(f"threshold: {threshold} {what}; give 0 to 1 for multi-label models")
        if is_one_image(images):
            (answer,) = self._predicted([images], block, threshold)
            if answer.error is not None:
                raise DataError(f"{answer.source} {answer.error}")
            return answer
        answers = self._predicted(_several(images), block, threshold)
        return list(answers) if isinstance(images, Sequence) else answers

    @overload
    def features(
        self, images: ImageLike | Sequence[ImageLike], *, block: int = ...
    ) -> np.ndarray: ...
    @overload
    def features(
        self, images: Iterable[ImageLike], *, block: int = ...
    ) -> np.ndarray | Iterator[np.ndarray]: ...
    def features(
        self, images: ImageLike | Iterable[ImageLike], *, block: int = EVAL_BLOCK
    ) -> np.ndarray | Iterator[np.ndarray]:
        """What the head is given of each image: an embedding.

        Args:
            images, block: as of ``predict``.

        Returns:
            of one image float32 (D,), of a list float32 (N, D), of an iterator an iterator of
            float32 (D,).

        Raises:
            DataError: an image cannot be read.
            UserError: what was given is no image, or an exported file does not tell its features.
        """
        if is_one_image(images):
            return next(self._features([images], block))
        rows = self._features(_several(images), block)
        if not isinstance(images, Sequence):
            return rows
        found = list(rows)
        return np.stack(found) if found else np.empty((0, 0), dtype=np.float32)

    @overload
    def explain(  # type: ignore[overload-overlap]
        self, images: ImageLike, label: str | None = ...
    ) -> Explanation: ...
    @overload
    def explain(
        self, images: Sequence[ImageLike], label: str | None = ...
    ) -> list[Explanation]: ...
    def explain(
        self, images: ImageLike | Sequence[ImageLike], label: str | None = None
    ) -> Explanation | list[Explanation]:
        """Heatmaps: where in each image the score of a class comes from.

        Args:
            images: one, or a list.
            label: the class; None: of each image the most probable one.

        Raises:
            DataError: an image cannot be read.
            UserError: no such class, or no heatmaps can be made of this model.
        """
        if label is not None and label not in self.classes:
            hint = did_you_mean(label, self.classes)
            raise UserError(f"label: {self.source} knows no class {label!r}{hint}")
        predictor = with_layers(self._predictor)
        one = is_one_image(images)
        found: list[Explanation] = []
        for block in _blocks([images] if one else _several(images), EVAL_BLOCK):
            found += _explained(predictor, block, label)
        return found[0] if one else found

    def _predicted(
        self, images: Iterable[object], block: int, threshold: float | None
    ) -> Iterator[Prediction]:
        for some in _blocks(images, block):
            seen, errors = _seen(self._predictor, some)
            sources = [each.source for each in some]
            with _computing():
                answers = predictions_of(
                    self._predictor, seen, sources, errors, threshold=threshold
                )
            yield from answers

    def _features(self, images: Iterable[object], block: int) -> Iterator[np.ndarray]:
        for some in _blocks(images, block):
            seen = _all_seen(self._predictor, some)
            with _computing():
                rows = self._predictor.features(seen)
            yield from rows


def _explained(predictor: Predictor, some: Sequence[Given], label: str | None) -> list[Explanation]:
    seen = _all_seen(predictor, some)
    with _computing():
        if label is None:
            numbers = predictor.probabilities(seen).argmax(1).tolist()
        else:
            numbers = [predictor.classes.index(label)] * len(some)
        found = explained(predictor, seen, numbers)
    return [
        Explanation(
            source=each.source,
            label=predictor.classes[number],
            heatmap=places,
            exact=bool(exact),
            picture=picture_of(image),
        )
        for each, number, places, exact, image in zip(
            some, numbers, found.spread, found.exact, seen, strict=True
        )
    ]


@contextmanager
def _computing() -> Iterator[None]:
    """Within the block kernels are chosen as for an evaluation, or the last bits would differ; one
    thread at a time, as there is one choice a process, and a network that is watched for heatmaps
    is one that nobody else computes."""
    with _ONE_AT_A_TIME, kernels_set_back():
        set_determinism(True)
        set_tf32(True)
        yield


def _several(images: object) -> Iterable[object]:
    """
    Raises:
        UserError: it is neither an image nor several.
    """
    if not isinstance(images, Iterable):
        given(images, 0)
    assert isinstance(images, Iterable)
    return images


def _blocks(images: Iterable[object], size: int) -> Iterator[list[Given]]:
    """Images read, so many at a time."""
    if size < 1:
        raise UserError(f"block: {size} images cannot be computed at a time; give 1 or more")
    numbered = (given(image, number) for number, image in enumerate(images))
    while block := list(islice(numbered, size)):
        yield block


def _seen(predictor: Predicting, some: Sequence[Given]) -> tuple[torch.Tensor, dict[int, str]]:
    """What the network sees, uint8 (N, C, S, S), and by place why some cannot be read: black."""
    side, channels = predictor.transform.image_size, predictor.transform.channels
    images = torch.empty((len(some), channels, side, side), dtype=torch.uint8)
    contents = (each.content for each in some)
    return images, fill_prepared(images, predictor.transform, contents)


def _all_seen(predictor: Predicting, some: Sequence[Given]) -> torch.Tensor:
    """
    Raises:
        DataError: one of them cannot be read.
    """
    images, errors = _seen(predictor, some)
    for place, error in errors.items():
        raise DataError(f"{some[place].source} {error}")
    return images
