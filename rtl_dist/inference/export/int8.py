"""The network of an ONNX graph in 8 bits: onnxruntime's static quantisation, calibrated on images
that the model was trained on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtl_dist.inference.export.onnx_file import require_onnx
from rtl_dist.inference.export.programs import quiet

CALIBRATED_ON = 256
"""Training images."""
_BATCH = 16
# what costs time, and what lies between; normalisation and softmax stay in float32
_OPERATIONS = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]


def quantized(batch: Any, views: torch.Tensor) -> Any:
    """
    Args:
        batch: the ModelProto of a batch of views, float32.
        views: uint8 (N, C, S, S), of training images.

    Returns:
        another, whose weights and activations have 8 bits. Weights use 7 of them: on CPUs without
        VNNI the sums of products of 8 would overflow, so accuracy would depend on the machine.
    """
    onnx = require_onnx()
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = _batches_of(views)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    with tempfile.TemporaryDirectory() as folder, quiet(), _silenced():
        made, ready, done = (Path(folder) / f"{name}.onnx" for name in ("made", "ready", "done"))
        onnx.save(batch, made)
        quant_pre_process(made, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            done,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_OPERATIONS,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(done)
    del model.graph.value_info[:]
    return model


def _batches_of(views: torch.Tensor) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(views), _BATCH):
        part = views[first : first + _BATCH].permute(0, 2, 3, 1).contiguous()
        yield {"images": part.numpy()}


@contextmanager
def _silenced() -> Iterator[None]:
    """onnxruntime advises on the root logger to do what was just done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
