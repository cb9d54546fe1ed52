"""A model as the graphs that are exported: from an image of any size, and from a batch of views."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.inference.export.view import View
from rtl_dist.model.folder import LoadedModel


class BatchGraph(nn.Module):
    """uint8 (N, S, S, C) views to float32 (N, K) calibrated probabilities: normalisation, network,
    temperature, softmax or sigmoid. In evaluation mode, on the CPU, in float32."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.classifier = copy.deepcopy(loaded.model).to("cpu", torch.float32)
        self.classifier.head.fold()
        self.temperature = loaded.calibration.temperature
        self.is_multi_label = loaded.task == MULTI_LABEL
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(images.permute(0, 3, 1, 2))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.sigmoid() if self.is_multi_label else logits.softmax(1)


class ImageGraph(nn.Module):
    """uint8 (H, W, C), one image of any size, to float32 (1, K) probabilities."""

    def __init__(self, batch: BatchGraph) -> None:
        super().__init__()
        view = batch.classifier.preprocessing
        self.view = View(image_size=view.image_size, crop_pct=view.crop_pct)
        self.batch = batch

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        probabilities: torch.Tensor = self.batch(self.view(image))
        return probabilities
