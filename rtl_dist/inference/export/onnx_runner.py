"""Exported ONNX files, run by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtl_dist.core.errors import UserError
from rtl_dist.core.text import brief
from rtl_dist.inference.export.onnx_file import PIXELS, VIEW, layer_of, require_onnx

_LARGEST = 2**31 - 1  # bytes of a protobuf
_QUIET = 3  # errors, which are raised too


class OnnxRunner:
    """See ``Runner``."""

    def __init__(self, whole: Any, batch: Any = None) -> None:
        """
        Args:
            whole: a ModelProto, as ``joined`` makes it.
            batch: the one of a batch of views, as it lies beside it; None: the part of ``whole``.

        Raises:
            UserError: onnxruntime cannot run it; its reason is told.
        """
        self._whole = whole
        self._of_image = session_of(whole)
        self._of_views = session_of(batch_part(whole) if batch is None else batch)

    def of_image(self, image: torch.Tensor) -> np.ndarray:
        fed = image.permute(1, 2, 0).contiguous().numpy()
        found: np.ndarray = self._of_image.run(["probabilities"], {"image": fed})[0]
        return found[0]

    def of_views(self, views: torch.Tensor) -> np.ndarray:
        fed = views.permute(0, 2, 3, 1).contiguous().numpy()
        found: np.ndarray = self._of_views.run(["probabilities"], {"images": fed})[0]
        return found

    def layers(self, image: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
        onnx = require_onnx()
        last = {layer_of(node): node.output[0] for node in self._whole.graph.node}
        last |= {"view": PIXELS, "": "probabilities"}
        told = type(self._whole)()
        told.CopyFrom(self._whole)
        del told.graph.output[:]
        told.graph.output.extend(onnx.helper.ValueInfoProto(name=name) for name in last.values())
        fed = image.permute(1, 2, 0).contiguous().numpy()
        yield from zip(last, session_of(told).run(None, {"image": fed}), strict=True)


def session_of(model: Any) -> Any:
    """
    Raises:
        UserError: onnxruntime cannot run it; its reason is told.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _QUIET
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions have no common base
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"onnxruntime cannot run the ONNX graph ({reason})") from error


def batch_part(whole: Any) -> Any:
    """The graph of a batch of views, of that of an image: all behind the view.

    Raises:
        UserError: it has no such part.
    """
    onnx = require_onnx()
    part = type(whole)()
    part.CopyFrom(whole)
    graph = part.graph
    made = next((node.output[0] for node in graph.node if PIXELS in node.output), None)
    image = next((each for each in graph.input if each.name == "image"), None)
    if made is None or image is None or not graph.output:
        raise UserError(f"the ONNX graph has no tensor {PIXELS} between its view and its network")
    kept = [node for node in graph.node if not node.name.startswith(VIEW)]
    for node in kept:
        node.input[:] = ["images" if name == PIXELS else name for name in node.input]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    weights = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    channels = image.type.tensor_type.shape.dim[2].dim_value
    del graph.input[:]
    graph.input.append(
        onnx.helper.make_tensor_value_info(
            "images", onnx.TensorProto.UINT8, ["batch", None, None, channels]
        )
    )
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return part


def read_onnx(path: Path) -> Any:
    """A ModelProto, of a file that needs no other.

    Raises:
        UserError: it cannot be read, is no such file, or names others.
    """
    onnx = require_onnx()
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} is no ONNX file: it is larger than one can be")
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, onnx.checker.ValidationError) as error:
        raise UserError(f"{path} is no ONNX file") from error
    except Exception as error:  # protobuf's own
        raise UserError(f"{path} is no ONNX file ({type(error).__name__})") from error
    for tensor in _tensors_of(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise UserError(
                f"{path} keeps the tensor {brief(tensor.name)} in another file, which rtl-dist"
                " never does; export it again"
            )
    return model


def _tensors_of(graph: Any) -> Iterator[Any]:
    """All of a graph, of those in its nodes too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _tensors_of(inner)
