"""MODEL as an exported file, ``.onnx`` or ``.pt2``: scored by the very path of a model folder.

Its graph gives probabilities; the logits that these come from are made of them, so everything
behind the network, the calibration's reading of logits too, is what it is for a folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.inference.export.metadata import Metadata, read_metadata
from rtl_dist.inference.export.runner import Runner
from rtl_dist.model.classifier import Classifier, Preprocessing
from rtl_dist.model.folder import LoadedModel, load_model

_NAMES = ("model.onnx", "model.pt2")
_TRIED = ((9, 14), (61, 40))  # height and width of images by which the view is checked


def open_model(path: str | Path) -> LoadedModel:
    """A run folder, a checkpoint folder, a model folder, or what ``rtl-dist export`` made.

    Raises:
        UserError: it is none of these, or is damaged.
    """
    file = exported_file(path)
    return load_model(path) if file is None else load_exported(file)


def exported_file(path: str | Path) -> Path | None:
    """The ``.onnx`` or ``.pt2`` file that is meant; None: it is no exported one."""
    given = Path(path)
    if given.suffix in (".onnx", ".pt2") and not given.is_dir():
        if not given.is_file():
            raise UserError(f"{given} is no file")
        return given
    return next((given / name for name in _NAMES if (given / name).is_file()), None)


def load_exported(file: Path) -> LoadedModel:
    """
    Raises:
        UserError: it is damaged, was not made by ``rtl-dist export`` or cannot be run here.
    """
    runner: Runner
    if file.suffix == ".onnx":  # what only these need takes its time to import
        from rtl_dist.inference.export.onnx_runner import OnnxRunner, read_onnx

        model = read_onnx(file)
        metadata = read_metadata({each.key: each.value for each in model.metadata_props}, file)
        runner = OnnxRunner(model)
    else:
        from rtl_dist.inference.export.pt2_file import read_pt2
        from rtl_dist.inference.export.pt2_runner import Pt2Runner
        from rtl_dist.inference.export.pt2_vetting import vetted_metadata

        metadata = read_metadata(vetted_metadata(file), file)
        runner = Pt2Runner(*read_pt2(file))
    network = ExportedNetwork(runner, metadata)
    network.require_as_described(file)
    described = metadata.described
    return LoadedModel(
        model=network,
        classes=described.classes,
        task=described.task,
        dataset_fingerprint=described.dataset_fingerprint,
        precision="no",
        source=file,
        network=described.model,
        calibration=described.calibration,
    )


class ExportedNetwork(Classifier):
    """The graph of an exported file, on the CPU, in the numbers that it has."""

    shows_layers = False

    def __init__(self, runner: Runner, metadata: Metadata) -> None:
        described = metadata.described
        mean, std = described.mean_std
        super(Classifier, self).__init__()
        self.preprocessing = Preprocessing(
            image_size=described.data.image_size,
            crop_pct=described.data.crop_pct,
            mean=mean,
            std=std,
        )
        self.runner, self.metadata = runner, metadata

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, C, S, S) to float32 (n, K): logits whose softmax or sigmoid, by the
        calibration, is what the graph gives."""
        probabilities = torch.from_numpy(self.runner.of_views(images.cpu())).double()
        logits = probabilities.log()
        if self.metadata.described.task == MULTI_LABEL:
            logits = probabilities.logit()
        return (logits * self.metadata.described.calibration.temperature).to(
            images.device, torch.float32
        )

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """What ``features`` gives are scores."""
        return features

    def require_as_described(self, file: Path) -> None:
        """
        Raises:
            UserError: what the file says of itself is not what its graph does.
        """
        described, side = self.metadata.described, self.preprocessing.image_size
        channels = self.preprocessing.channels
        transform = EvalTransform(
            image_size=side, crop_pct=self.preprocessing.crop_pct, channels=channels
        )
        generator = torch.Generator().manual_seed(0)
        for height, width in _TRIED:
            image = torch.randint(0, 256, (channels, height, width), generator=generator)
            image = image.to(torch.uint8)
            try:
                one = self.runner.of_image(image)
                other = self.runner.of_views(transform.of_pixels(image)[None])
            except Exception as error:  # a runtime's own
                raise UserError(
                    f"{file} does not take the images that it says it takes"
                    f" ({' '.join(str(error).split())[:120]})"
                ) from error
            count = len(described.classes)
            if one.shape != (count,) or other.shape != (1, count):
                raise UserError(
                    f"{file} has {count:,} labels, but its graph gives {_shape(one)}"
                    f" probabilities of an image and {_shape(other)} of a batch of one"
                )
            if not np.isfinite(one).all() or one.min() < 0 or one.max() > 1:
                raise UserError(f"{file}: what its graph gives are no probabilities")
            if float(np.abs(one - other[0]).max()) > 1e-3:
                raise UserError(
                    f"{file}: its graph does not resize and crop as its metadata says; export again"
                )


def _shape(values: np.ndarray) -> str:
    return " x ".join(map(str, values.shape)) or "one"
