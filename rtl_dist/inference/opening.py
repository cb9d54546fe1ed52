"""What MODEL means, opened to predict with: a folder of ours, or a file that was exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rtl_dist.config import Precision
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.distributed.precision import precision_as_trained
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.inference.export.exported import open_model
from rtl_dist.inference.predictor import Flips, Predicting, Predictor
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.folder import LoadedModel


class Opened:
    """A MODEL that was found and read, not yet on a device: the processes meet in between, in the
    precision that it asks for."""

    def __init__(self, path: str | Path, *, raw: bool = False) -> None:
        """
        Args:
            path: a run folder (its best weights), a checkpoint folder, a model folder or what was
                exported.
            raw: whether its calibration is left out.

        Raises:
            UserError: it is none of these, or is damaged.
        """
        loaded = open_model(path)
        self._loaded: LoadedModel = replace(loaded, calibration=Calibration()) if raw else loaded
        self.precision: Precision = precision_as_trained(loaded.precision)

    @property
    def num_classes(self) -> int:
        return len(self._loaded.classes)

    @property
    def is_multi_label(self) -> bool:
        return self._loaded.task == MULTI_LABEL

    def predictor(self, *, runtime: Runtime | None = None, tta: Flips | None = None) -> Predicting:
        """See ``Predictor``."""
        return Predictor(self._loaded, runtime=runtime, tta=tta)


def open_predictor(
    path: str | Path,
    *,
    runtime: Runtime | None = None,
    tta: Flips | None = None,
    raw: bool = False,
) -> Predicting:
    """A model ready to predict. Args and raises as ``Opened`` and ``Predictor``."""
    return Opened(path, raw=raw).predictor(runtime=runtime, tta=tta)
