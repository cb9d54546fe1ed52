"""Exported folders as timm and transformers load them: preprocessing is theirs there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import MULTI_LABEL, Task
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.inference.export.programs import quiet


class TimmRunner:
    """See ``Runner``; a folder that ``timm.create_model("local-dir:...")`` loads."""

    def __init__(self, folder: Path, task: Task, ours: EvalTransform) -> None:
        """
        Args:
            ours: by which layers are compared of the same pixels.

        Raises:
            UserError: timm cannot load it; its reason is told.
        """
        import timm
        from timm.data import create_transform, resolve_data_config

        try:
            with quiet():
                self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except Exception as error:  # of all kinds
            raise UserError(f"timm cannot load the network ({_line(error)})") from error
        config = resolve_data_config({}, model=self.model)
        self._transform = create_transform(**config, is_training=False)
        shape = (1, len(config["mean"]), 1, 1)
        self._mean = torch.tensor(config["mean"]).view(shape)
        self._std = torch.tensor(config["std"]).view(shape)
        self._is_multi_label, self._ours = task == MULTI_LABEL, ours

    def of_image(self, image: torch.Tensor) -> np.ndarray:
        return self._of(self._transform(picture_of(image))[None])[0]

    def of_views(self, views: torch.Tensor) -> np.ndarray:
        return self._of((views.float() / 255 - self._mean) / self._std)

    def layers(self, image: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
        heard: dict[str, np.ndarray] = {}

        def hear(name: str) -> Any:
            def keep(_: Any, __: Any, given: Any) -> None:
                if isinstance(given, torch.Tensor):
                    heard[f"classifier.trunk.{name}"] = given.clone().numpy()

            return keep

        hooks = [
            module.register_forward_hook(hear(name))
            for name, module in self.model.named_modules()
            if name
        ]
        self.of_views(self._ours.of_pixels(image)[None])
        for hook in hooks:
            hook.remove()
        yield from heard.items()

    @torch.inference_mode()
    def _of(self, pixels: torch.Tensor) -> np.ndarray:
        logits = self.model(pixels)
        scores: torch.Tensor = logits.sigmoid() if self._is_multi_label else logits.softmax(1)
        return scores.numpy()


class TransformersRunner(TimmRunner):
    """See ``Runner``; a folder that ``transformers.pipeline`` loads. Views go through timm, which
    transformers wraps."""

    def __init__(
        self, folder: Path, task: Task, ours: EvalTransform, classes: tuple[str, ...]
    ) -> None:
        """
        Raises:
            UserError: transformers is not installed, or cannot load it; its reason is told.
        """
        super().__init__(folder, task, ours)
        try:
            from transformers import pipeline
            from transformers.utils import logging
        except ImportError as error:
            raise UserError(
                "--format hf is checked by loading it: pip install 'rtl_dist[export]'"
            ) from error
        self._classes = classes
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            with quiet():
                self._pipeline = pipeline("image-classification", model=str(folder), device="cpu")
        except Exception as error:  # of all kinds
            raise UserError(f"transformers cannot load the network ({_line(error)})") from error

    def of_image(self, image: torch.Tensor) -> np.ndarray:
        with quiet():
            told = self._pipeline(picture_of(image), top_k=len(self._classes))
        scores = {each["label"]: each["score"] for each in told}
        return np.array([scores[name] for name in self._classes], dtype=np.float32)


def picture_of(image: torch.Tensor) -> Image.Image:
    """Of uint8 (1 or 3, H, W)."""
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
