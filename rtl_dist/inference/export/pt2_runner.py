"""Exported programs of torch, run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram


class Pt2Runner:
    """See ``Runner``."""

    def __init__(self, image: ExportedProgram, batch: ExportedProgram) -> None:
        self._of_image, self._of_views = image.module(), batch.module()

    @torch.inference_mode()
    def of_image(self, image: torch.Tensor) -> np.ndarray:
        found: torch.Tensor = self._of_image(image.permute(1, 2, 0).contiguous())
        return found[0].numpy()

    @torch.inference_mode()
    def of_views(self, views: torch.Tensor) -> np.ndarray:
        found: torch.Tensor = self._of_views(views.permute(0, 2, 3, 1).contiguous())
        return found.numpy()

    @torch.inference_mode()
    def layers(self, image: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
        assert isinstance(self._of_image, fx.GraphModule)
        listening = _Listening(self._of_image)
        listening.run(image.permute(1, 2, 0).contiguous())
        yield from listening.heard.items()


class _Listening(fx.Interpreter):
    """Runs a program and keeps what each module gave last."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.heard: dict[str, np.ndarray] = {}

    def run_node(self, n: fx.Node) -> Any:
        given = super().run_node(n)
        stack = list(n.meta.get("nn_module_stack", {}).values())
        if stack and isinstance(given, torch.Tensor):
            name = str(stack[-1][0]).removeprefix("batch.").removeprefix("batch")
            self.heard[name] = given.clone().numpy()
        return given
