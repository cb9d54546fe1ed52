"""What an exported file says of itself, so that nothing else need be kept with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rtl_dist.core.errors import UserError
from rtl_dist.model.described import Described, parse_description
from rtl_dist.model.folder import LoadedModel, describe_model

Numbers = Literal["float32", "int8"]
IN_PT2 = "rtl_dist.json"
"""The file of a ``.pt2`` archive that holds it; ONNX has a place of its own."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Of an exported file, as read from it."""

    described: Described
    """The model, as the ``config.json`` of its folder has it."""
    fingerprint: str
    """Hex: of the weights and the description that were exported."""
    numbers: str
    """In which the network multiplies: ``float32`` or ``int8``."""


def metadata_of(loaded: LoadedModel, numbers: Numbers) -> dict[str, str]:
    """Text by key. ``rtl_dist`` is what ``config.json`` of a model folder holds; the labels,
    thresholds and task stand for themselves too, for whoever reads them without us."""
    thresholds = loaded.calibration.thresholds
    view = loaded.model.preprocessing
    return {
        "rtl_dist": json.dumps(describe_model(loaded), ensure_ascii=False, sort_keys=True),
        "labels": json.dumps(list(loaded.classes), ensure_ascii=False),
        "thresholds": json.dumps(None if thresholds is None else list(thresholds)),
        "task": str(loaded.task),
        "image_size": str(view.image_size),
        "channels": str(view.channels),
        "fingerprint": fingerprint_of(loaded),
        "numbers": numbers,
    }


def fingerprint_of(loaded: LoadedModel) -> str:
    """sha256 in hex of the weights, by name, and of the description."""
    digest = hashlib.sha256()
    for name, value in sorted(loaded.model.native_state_dict().items()):
        content = value.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}\n".encode())
        digest.update(content.numpy().tobytes())
    digest.update(json.dumps(describe_model(loaded), sort_keys=True).encode())
    return digest.hexdigest()


def read_metadata(found: Mapping[str, str], where: Path) -> Metadata:
    """
    Raises:
        UserError: it is not that of a file that ``rtl-dist export`` made.
    """
    for key in ("rtl_dist", "labels", "fingerprint", "numbers"):
        if key not in found:
            raise UserError(f"{where} was not written by rtl-dist (its metadata has no {key})")
    described = parse_description(found["rtl_dist"], where)
    if found["labels"] != json.dumps(list(described.classes), ensure_ascii=False):
        raise UserError(f"{where} was not written by rtl-dist (labels and rtl_dist disagree)")
    return Metadata(
        described=described, fingerprint=found["fingerprint"][:64], numbers=found["numbers"][:16]
    )
