"""The graphs of a model traced by torch, with the sizes that may vary left open."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.export import Dim, ExportedProgram

from rtl_dist.core.errors import UserError
from rtl_dist.inference.export.graphs import BatchGraph, ImageGraph
from rtl_dist.inference.export.view import View

_OPERATION = re.compile(r"(?:aten|torchvision|prims|timm|_operator)(?:\.|::)\w+(?:\.\w+)?")
_SAMPLE = (37, 45)  # height and width of an image to trace with: no two sizes of it are the same
T = TypeVar("T")


def batch_program(graph: BatchGraph) -> ExportedProgram:
    """Of N views.

    Raises:
        UserError: the network does what cannot be exported; the operation is named.
    """
    view = graph.classifier.preprocessing
    images = torch.zeros(2, view.image_size, view.image_size, view.channels, dtype=torch.uint8)
    return _traced(
        lambda: torch.export.export(graph, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
    )


def image_program(graph: ImageGraph | View, channels: int) -> ExportedProgram:
    """Of an image of any size, or of its view alone. Raises as ``batch_program``."""
    image = torch.zeros(*_SAMPLE, channels, dtype=torch.uint8)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return _traced(lambda: torch.export.export(graph, (image,), dynamic_shapes=(sizes,)))


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own past and future, of which a user can change nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cannot_export(error: Exception, to: str) -> UserError:
    """What to say where an exporter gave up: which operation, as far as it says so."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 10:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    operation = next((found[0] for text in texts if (found := _OPERATION.search(text))), None)
    told = next((line.strip() for text in texts for line in text.splitlines() if line.strip()), "")
    which = f"the operation {operation}" if operation else "an operation of it"
    return UserError(
        f"--format {to}: this network cannot be exported: {which} cannot be written ({told[:160]})"
    )


def _traced(export: Callable[[], T]) -> T:
    try:
        with quiet(), torch.no_grad():
            return export()
    except Exception as error:  # torch's exporter raises of all kinds
        raise cannot_export(error, "pt2") from error
