"""The examples of serving an export: what they say fits the files, and is what the model says."""

import base64
import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from pack_images import image_bytes
from serving_examples import example

KINDS = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)"}


def onnx_file(path, kind, sizes, *, batch, task="single_label"):
    """A graph of an export's inputs and outputs: the mean of each channel as probabilities."""
    given = helper.make_tensor_value_info(kind, TensorProto.UINT8, sizes)
    probabilities = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, 3])
    nodes = [
        helper.make_node("Cast", [kind], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["most"], value_float=255.0),
        helper.make_node("Div", ["float", "most"], ["share"]),
        helper.make_node("Constant", [], ["axes"], value_ints=[-3, -2]),
        helper.make_node("ReduceMean", ["share", "axes"], ["mean"], keepdims=0),
        helper.make_node("Constant", [], ["shape"], value_ints=[-1, 3]),
        helper.make_node("Reshape", ["mean", "shape"], ["probabilities"]),
    ]
    graph = helper.make_graph(nodes, "g", [given], [probabilities])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    about = {"labels": json.dumps(["red", "green", "blue"]), "channels": "3", "task": task}
    helper.set_model_props(model, about | {"thresholds": "[0.1, 0.99, 0.1]"})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    onnx_file(folder / "model.onnx", "image", ["height", "width", 3], batch=1)
    onnx_file(folder / "batch.onnx", "images", ["batch", 16, 16, 3], batch="batch")
    return folder


@pytest.mark.parametrize(("file", "batched"), [("model", False), ("batch", True)])
def test_tritons_config_says_what_the_graph_takes_and_gives(export, tmp_path, file, batched):
    path = export / f"{file}.onnx"
    example("triton_repository").add_model(path, tmp_path, "m", batched=batched)
    config = (tmp_path / "m" / "config.pbtxt").read_text()
    assert (tmp_path / "m" / "1" / "model.onnx").read_bytes() == path.read_bytes()
    assert (tmp_path / "m" / "labels.txt").read_text().split() == ["red", "green", "blue"]
    assert int(re.search(r"max_batch_size: (\d+)", config)[1]) == (64 if batched else 0)
    pattern = r'(input|output) \[ \{ name: "(\w+)", data_type: (\w+), dims: \[ ([-\d, ]+) \]'
    said = {
        name: (kind, KINDS[type_], dims) for kind, name, type_, dims in re.findall(pattern, config)
    }
    session = onnxruntime.InferenceSession(path)
    for kind, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for tensor in tensors:
            of_config, type_, dims = said.pop(tensor.name)
            assert (of_config, type_) == (kind, tensor.type)
            sizes = [int(size) for size in dims.split(",")]
            shape = tensor.shape[1:] if batched else tensor.shape
            assert sizes == [size if isinstance(size, int) else -1 for size in shape]
    assert not said


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_litserve_gives_the_exports_probabilities(tmp_path, task):
    pytest.importorskip("litserve")
    path = onnx_file(tmp_path / "m.onnx", "image", ["height", "width", 3], batch=1, task=task)
    server = example("litserve_server").Classify(str(path))
    server.setup("cpu")
    content = image_bytes(3, (31, 12), "PNG")
    pixels = server.decode_request({"image": base64.b64encode(content).decode()})
    assert pixels.shape == (12, 31, 3)
    told = server.encode_response(server.predict(pixels))
    wanted = pixels.mean((0, 1)) / 255
    np.testing.assert_allclose(list(told["probabilities"].values()), wanted, rtol=1e-5)
    if task == "single_label":
        assert told["label"] == ("red", "green", "blue")[wanted.argmax()]
    else:
        assert told["labels"] == ["red", "blue"]
