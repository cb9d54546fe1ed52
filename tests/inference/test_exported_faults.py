"""Exported files that are damaged, of others, or hostile: a line each, and nothing executed."""

import io
import json
import zipfile

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_sets import Canary

from rtl_dist.core.errors import UserError
from rtl_dist.inference.export.exported import open_model
from rtl_dist.inference.export.pt2_file import BATCH, IMAGE, save_pt2
from rtl_dist.inference.export.pt2_vetting import vetted_metadata


class Tiny(torch.nn.Module):
    """One operation, with a size left open."""

    def forward(self, images):
        return images.float().mean((1, 2, 3)).sigmoid() + images.shape[0]


@pytest.fixture(scope="module")
def pt2(tmp_path_factory):
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    program = torch.export.export(
        Tiny(), (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    path = tmp_path_factory.mktemp("pt2") / "x.pt2"
    save_pt2(path, program, program, {"task": "single_label"})
    return path


def changed(path, out, name, change):
    """A copy of an archive, one of its files changed, or added."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        contents = {each.partition("/")[2]: old.read(each) for each in old.namelist()}
        contents[name] = change(contents.get(name, b""))
        for each, content in contents.items():
            new.writestr(f"{root}/{each}", content)
    return out


def in_json(change):
    def apply(content):
        told = json.loads(content)
        change(told)
        return json.dumps(told).encode()

    return apply


def first_formula(value, text):
    """Puts ``text`` where the first formula of a size is."""
    if isinstance(value, dict):
        if "expr_str" in value:
            value["expr_str"] = text
            return True
        value = list(value.values())
    return isinstance(value, list) and any(first_formula(each, text) for each in value)


def test_a_file_of_ours_is_read(pt2):
    assert vetted_metadata(pt2) == {"task": "single_label"}
    assert torch.export.load(pt2).module()(torch.zeros(5, 4, 4, 3, dtype=torch.uint8)).shape == (5,)
    assert (IMAGE, BATCH) == ("model", "batch")


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def hostile(canary):
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    return {
        "sample inputs": ("data/sample_inputs/model.pt", lambda _: pickled((Canary(canary),))),
        "formula": ("models/model.json", in_json(lambda told: first_formula(told, code))),
        "power": ("models/model.json", in_json(lambda told: first_formula(told, "9**9**9**9"))),
        "attribute": (
            "models/model.json",
            in_json(lambda told: first_formula(told, "Integer.__class__")),
        ),
        "guard": ("models/model.json", in_json(lambda told: told.update(guards_code=[code]))),
        "function": (
            "models/batch.json",
            in_json(
                lambda told: told["graph_module"]["graph"]["nodes"][0].update(target="torch.load")
            ),
        ),
        "file": (
            "models/batch.json",
            in_json(
                lambda told: told["graph_module"]["graph"]["nodes"][0].update(
                    target="torch.ops.aten.from_file.default"
                )
            ),
        ),
        "weights": (
            "data/weights/model_weights_config.json",
            lambda _: b'{"config": {"w": {"path_name": "weight_0", "use_pickle": true}}}',
        ),
        "library": ("data/aotinductor/model/x.so", lambda _: b"\x7fELF"),
        "object": ("data/constants/custom_obj_0", lambda _: b"x"),
        "labels": ("extra/rtl_dist.json", lambda _: b"[1]"),
        "no archive": ("extra/rtl_dist.json", lambda _: b"\xff{"),
    }


@pytest.mark.parametrize("kind", list(hostile("")))
def test_a_hostile_pt2_file_is_refused_before_torch_reads_it(pt2, tmp_path, kind):
    canary = tmp_path / "canary"
    file = changed(pt2, tmp_path / "y.pt2", *hostile(canary)[kind])
    is_damage = kind in ("labels", "no archive")
    told_as = "was not written by rtl-dist" if is_damage else "is not read: .* no file of rtl-dist"
    with pytest.raises(UserError, match=told_as) as told:
        vetted_metadata(file)
    assert "\n" not in str(told.value)
    assert not canary.exists()


def test_a_second_file_of_one_name_is_refused(pt2, tmp_path):
    file = changed(pt2, tmp_path / "y.pt2", "archive_version", lambda content: content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other/models/model.json", "{}")
    with pytest.raises(UserError, match="two files of one name"):
        vetted_metadata(file)


def test_what_is_no_archive_or_not_there_is_told(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"garbage")
    (tmp_path / "x.onnx").write_bytes(b"\x00garbage\xff" * 9)
    for name in ("x.pt2", "x.onnx"):
        with pytest.raises(UserError, match=name):
            open_model(tmp_path / name)
    with pytest.raises(UserError, match=r"no\.onnx is no file"):
        open_model(tmp_path / "no.onnx")


CONFIG = {
    "label_names": ["a", "b", "c"],
    "pretrained_cfg": {
        "input_size": [3, 8, 8],
        "crop_pct": 1.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    },
    "rtl_dist": {
        "model": {"name": "basic_cnn"},
        "task": "single_label",
        "precision": "no",
        "dataset_fingerprint": "f",
    },
}


def graph_file(path, *, count=3, metadata=None, weight=None):
    """An ONNX file of an export's inputs and outputs; it looks at no pixel."""
    kind = TensorProto
    nodes = [
        helper.make_node("Constant", [], ["view/size"], value_ints=[1, 8, 8, 3]),
        helper.make_node("ConstantOfShape", ["view/size"], ["view/zeros"], name="view/0"),
        helper.make_node("Cast", ["view/zeros"], ["view/pixels"], name="view/1", to=kind.UINT8),
        helper.make_node("Cast", ["view/pixels"], ["float"], to=kind.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "one"], ["means"]),
        helper.make_node("Add", ["means", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    nodes[0].name = "view/2"
    weights = [
        numpy_helper.from_array(torch.tensor([1, 2, 3]).numpy(), "axes"),
        numpy_helper.from_array(torch.tensor([1]).numpy(), "one"),
        weight or numpy_helper.from_array(torch.zeros(1, count).numpy(), "w"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", kind.UINT8, ["height", "width", 3])],
        [helper.make_tensor_value_info("probabilities", kind.FLOAT, [1, count])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    told = {
        "rtl_dist": json.dumps(CONFIG),
        "labels": json.dumps(CONFIG["label_names"]),
        "fingerprint": "0" * 64,
        "numbers": "float32",
    }
    helper.set_model_props(model, told if metadata is None else told | metadata)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_plain_graph_is_taken(tmp_path):
    assert open_model(graph_file(tmp_path / "x.onnx")).classes == ("a", "b", "c")


def elsewhere(location, length="4"):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1, 3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ({"count": 4}, "has 3 labels, but its graph gives 4"),
        ({"metadata": {"labels": '["a", "b"]'}}, "labels and rtl_dist disagree"),
        ({"metadata": {"labels": "{"}}, "labels and rtl_dist disagree"),
        ({"metadata": {"rtl_dist": "{}"}}, "was not written by rtl-dist"),
        ({"metadata": {"rtl_dist": "[" * 100_000}}, "was not written by rtl-dist"),
        ({"weight": elsewhere("../../../etc/passwd")}, "keeps the tensor 'w' in another file"),
        ({"weight": elsewhere("/tmp/huge", str(10**10))}, "keeps the tensor 'w' in another file"),
    ],
)
def test_a_hostile_onnx_file_is_refused_in_a_line(tmp_path, faults, told):
    with pytest.raises(UserError, match=r"x\.onnx") as raised:
        open_model(graph_file(tmp_path / "x.onnx", **faults))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_labels_that_are_missing_are_told(tmp_path):
    model = onnx.load(graph_file(tmp_path / "x.onnx"))
    kept = [each for each in model.metadata_props if each.key != "labels"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(UserError, match="its metadata has no labels"):
        open_model(tmp_path / "x.onnx")


def test_a_graph_that_looks_at_other_pixels_than_it_says_is_refused(tmp_path):
    """It makes a black view of every image, which only shows once its network looks at pixels."""
    model = onnx.load(graph_file(tmp_path / "x.onnx"))
    weight = next(each for each in model.graph.initializer if each.name == "w")
    weight.CopyFrom(numpy_helper.from_array(torch.tensor([[[1.0, 0, 0]]]).numpy()[0], "w"))
    add = next(node for node in model.graph.node if node.op_type == "Add")
    add.op_type = "Mul"
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(UserError, match="does not resize and crop as its metadata says"):
        open_model(tmp_path / "x.onnx")
