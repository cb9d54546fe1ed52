"""The one path from an image file's bytes to probabilities; evaluations take the same steps.

``rtl-dist predict``, the Python API and an export's parity check look at images by a
``Predicting``; a model folder's is ``Predictor``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torchvision.transforms.v2.functional import rgb_to_grayscale

from rtl_dist.core.device_memory import InParts
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.files import sha256_of
from rtl_dist.core.tasks import Task
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.distributed.devices import local_gpu, uses_gpu
from rtl_dist.distributed.precision import precision_as_trained, resolve_precision
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.evaluation.logits import eval_transform
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.classifier import place
from rtl_dist.model.divided import divide
from rtl_dist.model.folder import LoadedModel
from rtl_dist.prepare.conversion import as_readable

Flips = Literal["hflip"]


class Predicting(Protocol):
    """A trained model as whoever predicts sees it, however it is kept."""

    classes: tuple[str, ...]
    """The K names, in the order of the probabilities."""
    task: Task
    """Of the data that it was trained on."""
    calibration: Calibration
    """That its probabilities went through."""
    source: Path
    """The folder or file that it is from."""
    transform: EvalTransform
    """How it looks at an image."""

    def fingerprint(self) -> str:
        """Changes when the model does."""

    def prepare(self, content: bytes | torch.Tensor) -> torch.Tensor:
        """See ``prepared``."""

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """uint8 (N, C, S, S) to float32 (N, K)."""

    def features(self, images: torch.Tensor) -> np.ndarray:
        """uint8 (N, C, S, S) to float32 (N, D). Raises UserError: it does not tell them."""


def prepared(transform: EvalTransform, content: bytes | torch.Tensor) -> torch.Tensor:
    """What a model sees of an image: uint8 (C, S, S).

    Args:
        content: an image file of any format that ``pack`` takes, with ``--convert`` or without; or
            pixels, uint8 (1 or 3, height, width).

    Raises:
        DataError: the bytes are not a whole, decodable image; to be put behind the image's name.
    """
    if isinstance(content, bytes):
        return transform(as_readable(content), 0)
    pixels: torch.Tensor = content
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}")
    if pixels.shape[0] != transform.channels:
        pixels = rgb_to_grayscale(pixels, transform.channels)
    return transform.of_pixels(pixels)


def fill_prepared(
    out: torch.Tensor,
    transform: EvalTransform,
    contents: Iterable[bytes | torch.Tensor | DataError],
) -> dict[int, str]:
    """Fills ``out``, uint8 (N, C, S, S), with what a model sees of images; what cannot be read is
    black, so that the others keep their places and their values.

    Args:
        contents: see ``prepared``; or why there is none.

    Returns:
        by place, why some cannot be read.
    """
    errors: dict[int, str] = {}
    out[:] = 0
    for number, content in enumerate(contents):
        try:
            if isinstance(content, DataError):
                raise content
            out[number] = prepared(transform, content)
        except DataError as error:
            errors[number] = str(error)
    return errors


class Predictor:
    """A model folder's network on a device, in a precision, or an exported file's, on the CPU.

    It divides, folds and multiplies as ``score_split`` does, so the same images in the same blocks
    (``EVAL_BLOCK``) get the same values.
    """

    def __init__(
        self, loaded: LoadedModel, *, runtime: Runtime | None = None, tta: Flips | None = None
    ) -> None:
        """
        Args:
            loaded: is moved to the device, and left in eval mode.
            runtime: of the processes that share the work; None: there is this one, on its GPU if
                it has one, in the precision of the training where this machine can.
            tta: ``hflip``: the mean of an image's probabilities and those of its mirror image.

        Raises:
            UserError: ``tta`` is something else.
        """
        if tta not in (None, *get_args(Flips)):
            raise UserError(f"tta: there is no {tta!r}; give 'hflip' or None")
        self.classes, self.task = loaded.classes, loaded.task
        self.calibration, self.source = loaded.calibration, loaded.source
        self.transform = eval_transform(loaded.model)
        self.loaded, self._tta = loaded, tta
        if runtime is None:
            on_gpu = uses_gpu()
            self.device = torch.device("cuda", local_gpu()) if on_gpu else torch.device("cpu")
            self.precision = resolve_precision(
                precision_as_trained(loaded.precision), on_gpu=on_gpu
            )
        else:
            self.device, self.precision = runtime.device, runtime.precision
        dtype = torch.float64 if self.precision == "fp64" else torch.float32
        place(loaded.model, self.device, dtype)
        loaded.model.eval()
        self._multiplied_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        self._divided = divide(loaded.model, "head", dtype=self._multiplied_in)
        self._in_parts = InParts("predicting")

    def fingerprint(self) -> str:
        """sha256 in hex of the exported file, or of the folder's that say what the model is."""
        if self.source.is_file():
            return sha256_of(self.source)
        names = ("model.safetensors", "config.json", "state.json")
        files = [self.source / name for name in names if (self.source / name).is_file()]
        return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()

    def prepare(self, content: bytes | torch.Tensor) -> torch.Tensor:
        """See ``prepared``."""
        return prepared(self.transform, content)

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """uint8 (N, C, S, S) to float32 (N, K); softmax, or of multi-label models sigmoid."""
        return self._in_parts(self._probabilities, images).cpu().numpy()

    def features(self, images: torch.Tensor) -> np.ndarray:
        """uint8 (N, C, S, S) to what the head is given, float32 (N, D).

        Raises:
            UserError: it is an exported file.
        """
        if not self.loaded.model.shows_layers:
            raise UserError(f"{self.source} is an exported file, which gives no features")
        return self._in_parts(self._features, images).float().cpu().numpy()

    def _probabilities(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device)
        scores = self._scores(images)
        if self._tta == "hflip":
            scores = (scores + self._scores(images.flip(-1))) / 2
        return scores

    def _scores(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features = self._features(images)
            with self._autocast():
                logits = self._divided.trained(features)
            return self.calibration.probabilities(logits, self.task)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        assert self._divided.frozen is not None
        with torch.inference_mode(), self._autocast():
            features: torch.Tensor = self._divided.frozen(images.to(self.device))
        return features

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self._multiplied_in, enabled=self._multiplied_in is not None
        )
