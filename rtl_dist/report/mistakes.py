"""The surest mistakes of an evaluation as one picture: what was seen, and where in it the wrong
answer comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL, Task
from rtl_dist.core.tolerated import tolerated
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.decode import decode
from rtl_dist.evaluation.logits import eval_transform
from rtl_dist.inference.heatmaps import heatmaps
from rtl_dist.inference.pictures import Cell, grid, picture_of, png_of, with_heatmap
from rtl_dist.model.classifier import Classifier

MISTAKES_SHOWN = 24
_PICTURE_SIDE = 320


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A sample of which not all that was said is right."""

    sample: int
    """Its number in the split."""
    truth: str
    """What it is: the class's name, or the names of several."""
    predicted: str
    """What the model said."""
    confidence: float
    """How sure it was, 0 to 1, of its surest wrong decision."""
    label: int
    """The class's number of that decision, whose heatmap is shown."""
    label_name: str
    """That class's name."""
    was_said: bool
    """Whether the decision was that the image has the class; multi-label: it may be missed."""


def mistakes_picture(
    split: Split, mistakes: Sequence[Mistake], model: Classifier | None, *, task: Task
) -> bytes:
    """A PNG of at most 24 mistakes, each with its heatmap beside it; one that cannot be read has
    an empty place.

    Args:
        model: that made them, on any device; None: there are no heatmaps.

    Raises:
        DataError: a shard of the split cannot be opened.
    """
    mistakes = mistakes[:MISTAKES_SHOWN]
    if not mistakes:
        return png_of(grid([], title="No mistakes: every sample was predicted right."))
    reader = SampleReader(split)
    try:
        files = [_read(reader, mistake.sample) for mistake in mistakes]
    finally:
        reader.close()
    maps: list[Image.Image | None] = [None] * len(mistakes)
    if model is not None:
        with tolerated("the heatmaps of the mistakes could not be made"):
            maps = _with_maps(model, files, mistakes, task)
    cells = [
        Cell(
            picture=_shown(content),
            heatmap=found,
            lines=_lines(mistake, task) if content else (*_lines(mistake, task), "cannot be read"),
        )
        for mistake, content, found in zip(mistakes, files, maps, strict=True)
    ]
    return png_of(grid(cells))


def _lines(mistake: Mistake, task: Task) -> tuple[str, ...]:
    said = f"said {mistake.predicted or 'none'}  {100 * mistake.confidence:.1f} %"
    truth = f"is {mistake.truth or 'none'}"
    if task != MULTI_LABEL:
        return said, truth
    return said, truth, f"{'wrongly' if mistake.was_said else 'missed'} {mistake.label_name}"


def _read(reader: SampleReader, sample: int) -> bytes | None:
    try:
        content = reader.read(sample)
        decode(content, 3)
    except DataError:
        return None
    return content


def _shown(content: bytes | None) -> Image.Image | None:
    """The whole picture, no side above 320 pixels."""
    if content is None:
        return None
    picture = picture_of(decode(content, 3))
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    return picture


def _with_maps(
    model: Classifier, files: Sequence[bytes | None], mistakes: Sequence[Mistake], task: Task
) -> list[Image.Image | None]:
    """What the network saw of each file under its heatmap; None of those that are None."""
    transform = eval_transform(model)
    seen = {n: transform(content, 0) for n, content in enumerate(files) if content is not None}
    laid: list[Image.Image | None] = [None] * len(files)
    if seen:
        images, numbers = torch.stack(list(seen.values())), [mistakes[n].label for n in seen]
        found = heatmaps(model, images, numbers, against_others=task != MULTI_LABEL)
        for (number, image), places in zip(seen.items(), found.spread, strict=True):
            for_its_answer = places if mistakes[number].was_said else -places
            laid[number] = with_heatmap(picture_of(image), for_its_answer)
    return laid
