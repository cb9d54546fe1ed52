"""A model as a folder that timm loads, or timm and transformers; the temperature is in the head."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import write_json
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.model.folder import DESCRIPTION, LoadedModel, write_loaded

_TRANSFORMERS = {
    "model_type": "timm_wrapper",
    "architectures": ["TimmWrapperForImageClassification"],
}


def require_timm_knows(loaded: LoadedModel, to: str) -> None:
    """
    Raises:
        UserError: timm has no name for the network, or transformers reads no such images.
    """
    network = loaded.network
    architecture = network.name.removeprefix("torchvision:").partition(".")[0]
    if network.small_stem:
        why = "with model.small_stem it is a network that timm has no name for"
    elif not _is_timms(architecture):
        why = f"timm has no network {architecture!r}"
    elif to == "hf" and loaded.model.preprocessing.channels == 1:
        why = "transformers makes every image a colour one, and this network sees grey; take timm"
    else:
        return
    raise UserError(f"--format {to}: {why}; onnx and pt2 take any network")


def write_folder(folder: Path, loaded: LoadedModel, *, for_transformers: bool) -> LoadedModel:
    """Writes the files of a model folder, the softmax of whose logits is calibrated.

    Returns:
        the model as it was written.
    """
    model = copy.deepcopy(loaded.model).to("cpu", torch.float32).eval()
    model.head.fold()
    temperature = loaded.calibration.temperature
    with torch.no_grad():
        model.head.weight.div_(temperature)
        model.head.bias.div_(temperature)
    written = replace(loaded, model=model, calibration=replace(loaded.calibration, temperature=1.0))
    write_loaded(folder, written)
    if for_transformers:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        description |= _TRANSFORMERS
        if loaded.task == MULTI_LABEL:
            description["problem_type"] = "multi_label_classification"
        write_json(folder / DESCRIPTION, description)
    return written


def _is_timms(architecture: str) -> bool:
    import timm

    return bool(timm.is_model(architecture))
