"""Where an export and its model part: the first layer that gives something else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.inference.export.graphs import BatchGraph
from rtl_dist.inference.export.runner import Runner

_RELATIVE = 1e-3  # of the largest activation of a layer: rounding adds up to less


def first_difference(
    runner: Runner, graph: BatchGraph, transform: EvalTransform, image: torch.Tensor
) -> str:
    """The layer, for people, as a module's name in ``Classifier``; image: uint8 (C, H, W)."""
    given = dict(runner.layers(image))
    for name, wanted in _layers(graph, transform.of_pixels(image)):
        found = given.get(name)
        if found is None or found.size != wanted.size:
            continue  # an exporter made one of several
        if not np.isfinite(found).all():
            return f"{_shown(name)} (it gives what is no number)"
        difference = float(np.abs(found.ravel() - wanted.ravel().astype(found.dtype)).max())
        if name == "view":
            difference = float(np.abs(found.astype(int) - wanted.astype(int)).max())
            if difference > 0:
                return f"the resize and crop (by {difference:g} of 255)"
        elif difference > _RELATIVE * max(1e-3, float(np.abs(wanted).max())):
            return f"{_shown(name)} (by {difference:.3g})"
    return "no layer alone: its own resize, the head, or rounding that adds up"


def _layers(graph: BatchGraph, view: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
    """What the model's own modules make of a view uint8 (C, S, S), in order."""
    heard: list[tuple[str, np.ndarray]] = []

    def listen(name: str) -> torch.utils.hooks.RemovableHandle:
        def hear(_: torch.nn.Module, __: object, given: object) -> None:
            if isinstance(given, torch.Tensor):
                heard.append((name, given.detach().clone().numpy()))  # others work in place

        return graph.get_submodule(name).register_forward_hook(hear)

    # a module of several ends in the last of them
    single = [name for name, module in graph.named_modules() if not list(module.children())]
    hooks = [listen(name) for name in ("", *single)]
    try:
        with torch.inference_mode():
            graph(view.permute(1, 2, 0)[None])
    finally:
        for hook in hooks:
            hook.remove()
    yield "view", view.permute(1, 2, 0)[None].numpy()
    yield from heard


def _shown(name: str) -> str:
    return name.removeprefix("classifier.") or "the softmax or sigmoid"
