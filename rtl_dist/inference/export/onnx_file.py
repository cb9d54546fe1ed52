"""A model as ONNX: one file that takes an image of any size, one that takes a batch of views."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtl_dist.core.errors import UserError
from rtl_dist.inference.export.graphs import BatchGraph, ImageGraph
from rtl_dist.inference.export.programs import batch_program, cannot_export, image_program, quiet

OPSET = 18  # the first with all that is used, which onnxruntime 1.14 and later know
VIEW = "view/"
"""What the names of all that makes the view begin with."""
PIXELS = VIEW + "pixels"
"""The tensor between view and network, uint8 (N, S, S, C)."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_LARGEST = 2**31 - 1  # bytes of a protobuf


@dataclass(frozen=True, kw_only=True)
class OnnxGraphs:
    """The two parts of a model, of onnx's type ModelProto."""

    view: Any
    """uint8 ``image`` (height, width, C) to ``view/pixels`` (1, S, S, C)."""
    batch: Any
    """uint8 ``images`` (batch, S, S, C) to float32 ``probabilities`` (batch, K)."""


def make_onnx(graph: ImageGraph) -> OnnxGraphs:
    """
    Raises:
        UserError: onnx is not installed, or an operation has no ONNX counterpart.
    """
    onnx = require_onnx()
    channels = graph.batch.classifier.preprocessing.channels
    view = _converted(image_program(graph.view, channels), "image", "pixels")
    _name_sizes(view.graph.input[0], ["height", "width"])
    view = onnx.compose.add_prefix(view, VIEW, rename_inputs=False)
    return OnnxGraphs(view=view, batch=make_batch_onnx(graph.batch))


def make_batch_onnx(graph: BatchGraph) -> Any:
    """A ModelProto, see ``OnnxGraphs``. Raises as ``make_onnx``."""
    require_onnx()
    batch = _converted(batch_program(graph), "images", "probabilities")
    for value in (batch.graph.input[0], batch.graph.output[0]):
        _name_sizes(value, ["batch"])
    return batch


def joined(graphs: OnnxGraphs) -> Any:
    """uint8 ``image`` (height, width, C) to float32 ``probabilities`` (1, K)."""
    onnx = require_onnx()
    whole = onnx.compose.merge_models(graphs.view, graphs.batch, io_map=[(PIXELS, "images")])
    # sizes told of a batch are wrong of one image
    del whole.graph.value_info[:]
    whole.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    whole.graph.name = "image"
    return whole


def save_onnx(model: Any, path: Path, metadata: dict[str, str]) -> None:
    """Writes one file that needs no other.

    Raises:
        UserError: it is larger than a file of this format can be.
    """
    onnx = require_onnx()
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    model.producer_name, model.producer_version, model.doc_string = "rtl_dist", "", ""
    if model.ByteSize() > _LARGEST:
        raise UserError("--format onnx: the network has more than 2 GB; take pt2, timm or hf")
    path.write_bytes(model.SerializeToString())


def require_onnx() -> Any:
    """The package onnx, and beside it what exports to it and runs it.

    Raises:
        UserError: one of them is not installed.
    """
    try:
        import onnx
        import onnx.compose
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX needs {error.name}, which is not installed: pip install 'rtl_dist[export]'"
        ) from error
    return onnx


def layer_of(node: Any) -> str:
    """The module that a node was traced from, as ``trunk.layer1.0.conv1``; empty: of none."""
    scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), "")
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""


def _converted(program: torch.export.ExportedProgram, taken: str, given: str) -> Any:
    try:
        with quiet():
            converted = torch.onnx.export(
                program,
                input_names=[taken],
                output_names=[given],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of all kinds
        raise cannot_export(error, "onnx") from error
    assert converted is not None
    model = converted.model_proto
    for node in model.graph.node:  # the rest tells of folders on this machine
        kept = [each for each in node.metadata_props if each.key == _SCOPES]
        kept = [type(each)(key=each.key, value=each.value) for each in kept]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    return model


def _name_sizes(value: Any, names: list[str]) -> None:
    for size, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
        size.dim_param = name
