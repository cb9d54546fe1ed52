"""rtl_dist: distributed transfer learning with ResNets.

``from rtl_dist import load, train, evaluate, predict, pack, open_dataset``: these, and the names of
what they give, are imported from where they are when they are first asked for, so that to import
rtl_dist costs next to nothing, and torch is loaded when a function is called. See ``docs/api.md``.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtl_dist.api import (
        Config,
        Dataset,
        PackReport,
        evaluate,
        load,
        open_dataset,
        pack,
        predict,
        train,
    )
    from rtl_dist.core.errors import (
        DataError,
        OutOfMemory,
        RemoteError,
        RtlDistError,
        StopRequested,
        UserError,
    )
    from rtl_dist.inference.given import ImageLike
    from rtl_dist.inference.model import Explanation, Model
    from rtl_dist.inference.prediction import Prediction
    from rtl_dist.report.finished import Evaluation, Metrics, Picture, Run

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DataError",
    "Dataset",
    "Evaluation",
    "Explanation",
    "ImageLike",
    "Metrics",
    "Model",
    "OutOfMemory",
    "PackReport",
    "Picture",
    "Prediction",
    "RemoteError",
    "RtlDistError",
    "Run",
    "StopRequested",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "open_dataset",
    "pack",
    "predict",
    "train",
]

# Where those are that ``rtl_dist.api`` does not have.
_HOMES = {
    "rtl_dist.core.errors": (
        *("DataError", "OutOfMemory", "RemoteError", "RtlDistError"),
        *("StopRequested", "UserError"),
    ),
    "rtl_dist.inference.given": ("ImageLike",),
    "rtl_dist.inference.model": ("Explanation", "Model"),
    "rtl_dist.inference.prediction": ("Prediction",),
    "rtl_dist.report.finished": ("Evaluation", "Metrics", "Picture", "Run"),
}

# Before torch loads OpenMP: threads that wait must not spin. On as many cores as threads, spinning
# against loader workers or another job made CPU training 5 to 12 times slower (measured 2026-11,
# 2 EPYC vCPUs, torch 2.15); waiting passively costs little where cores are free.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before cuBLAS starts: only with a fixed workspace does it give the same bits twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "rtl_dist.api")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``train`` is the function, whether or not the file of that name, the main job's entry, was
    imported: Python puts a file that it imports into its package under its name."""

    @property
    def train(self) -> Any:
        return __getattr__("train")

    @train.setter
    def train(self, module: ModuleType) -> None:
        return


sys.modules[__name__].__class__ = _Package
