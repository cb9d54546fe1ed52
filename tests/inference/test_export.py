"""``rtl-dist export``: what is written says what the model says, or nothing is written."""

import base64
import copy
import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_models import FITTED, export, images_of, model_folder
from pack_images import image_bytes
from PIL import Image
from serving_examples import example
from tiny_runs import CLASSES, make_dataset

from rtl_dist import api
from rtl_dist.cli import main
from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.data.images.decode import decode
from rtl_dist.inference.export import export as story
from rtl_dist.inference.export.exported import open_model
from rtl_dist.inference.export.graphs import BatchGraph, ImageGraph
from rtl_dist.inference.export.onnx_file import make_batch_onnx, make_onnx, require_onnx
from rtl_dist.inference.opening import open_predictor
from rtl_dist.model.folder import load_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def graphs(model):
    return make_onnx(ImageGraph(BatchGraph(load_model(model))))


@pytest.fixture
def traced(graphs, monkeypatch):
    """Torch's exporter takes seconds, and gives the same again."""
    monkeypatch.setattr(story, "make_onnx", lambda graph: copy.deepcopy(graphs))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model, dataset, graphs):
    out = tmp_path_factory.mktemp("exports") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "make_onnx", lambda graph: copy.deepcopy(graphs))
        assert export(model, out, "onnx", "--data", dataset) == 0
    return out


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_an_onnx_file_gives_the_models_probabilities_from_file_bytes(exported, model, dataset):
    predictor = open_predictor(model)
    whole, batch = session(exported / "model.onnx"), session(exported / "batch.onnx")
    files = images_of(dataset)
    wanted = predictor.probabilities(torch.stack([predictor.prepare(file) for file in files]))
    for file, expected in zip(files, wanted, strict=True):
        pixels = decode(file, 3).permute(1, 2, 0).numpy()
        found = whole.run(["probabilities"], {"image": pixels})[0]
        np.testing.assert_allclose(found[0], expected, atol=1e-6)
    views = torch.stack([predictor.prepare(file) for file in files]).permute(0, 2, 3, 1).numpy()
    for size in (1, 2, 7):
        found = batch.run(["probabilities"], {"images": views[:size]})[0]
        np.testing.assert_allclose(found, wanted[:size], atol=1e-6)


def test_it_tells_labels_thresholds_and_where_it_is_from_and_no_folder_of_this_machine(
    exported, model
):
    about = session(exported / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == list(CLASSES)
    assert json.loads(about["thresholds"]) is None
    assert len(about["fingerprint"]) == 64
    content = (exported / "model.onnx").read_bytes()
    assert str(Path(story.__file__).parent).encode() not in content
    assert str(model.parent).encode() not in content


def test_the_table_of_formats_lies_beside_it(exported):
    told = json.loads((exported / "export.json").read_text())
    assert [row["name"] for row in told["formats"]] == ["model (torch)", "onnx"]
    assert told["checked_on"]["images"] == 15
    assert told["checked_on"]["odd_sizes_grey_and_turned"] >= 16
    assert 0 < told["formats"][1]["max_difference"] < 1e-5
    assert told["formats"][0]["metric"] == told["formats"][1]["metric"]


@pytest.mark.usefixtures("without_pictures")
def test_evaluate_and_predict_take_it_as_the_model(exported, model, dataset, tmp_path):
    def scored(given, name):
        out = tmp_path / name
        words = ["evaluate", given, "--data", dataset, "--split", "val", "--out", out]
        assert main([str(word) for word in (*words, "--workers", "0")]) == 0
        with (out / "predictions.csv").open(newline="") as file:
            return list(csv.DictReader(file)), json.loads((out / "metrics.json").read_text())

    (wanted, metrics), (found, of_export) = scored(model, "a"), scored(exported, "b")
    assert [row["predicted"] for row in found] == [row["predicted"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert float(one["confidence"]) == pytest.approx(float(other["confidence"]), abs=2e-6)
    for name in ("top1", "loss", "ece", "loss_raw", "ece_raw"):
        assert of_export[name] == pytest.approx(metrics[name], abs=1e-5)
    in_python = api.evaluate(exported / "model.onnx", dataset, "val", workers=0)
    assert in_python.folder == exported / "model" / "evaluation" / "val"
    assert in_python.predictions == found
    predictor = open_predictor(exported / "model.onnx")
    assert predictor.classes == CLASSES
    with pytest.raises(UserError, match="exported file, which gives no features"):
        predictor.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_example_beside_it_needs_no_torch(exported, model, tmp_path):
    rng = np.random.default_rng(0)
    photos = []
    for i, size in enumerate(((31, 57), (120, 40))):
        pixels = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 + i
        photos.append(tmp_path / f"{i}.jpg")
        pixels.save(photos[-1], quality=95, exif=exif)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuses:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'timm', 'rtl_dist'):\n"
        "            raise ImportError(f'{name} is not there')\n"
        "sys.meta_path.insert(0, Refuses())\n"
    )
    command = [sys.executable, exported / "example.py", *photos]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    predictor = open_predictor(model)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [Path(line[0]) for line in lines] == photos
    for photo, (_, said) in zip(photos, lines, strict=True):
        scores = predictor.probabilities(predictor.prepare(photo.read_bytes())[None])[0]
        label, probability = said.split()
        assert label == CLASSES[scores.argmax()]
        assert float(probability) == pytest.approx(float(scores.max()), abs=1e-5)
    assert len((exported / "example.py").read_text().splitlines()) < 50


def test_the_examples_of_serving_take_it(exported, model, tmp_path):
    triton = example("triton_repository")
    triton.add_model(exported / "model.onnx", tmp_path, "one", batched=False)
    triton.add_model(exported / "batch.onnx", tmp_path, "many", batched=True)
    one, many = ((tmp_path / n / "config.pbtxt").read_text() for n in ("one", "many"))
    assert 'name: "image", data_type: TYPE_UINT8, dims: [ -1, -1, 3 ]' in one
    assert 'name: "images", data_type: TYPE_UINT8, dims: [ 32, 32, 3 ]' in many
    assert 'name: "probabilities", data_type: TYPE_FP32, dims: [ 3 ]' in many
    pytest.importorskip("litserve")
    server = example("litserve_server").Classify(str(exported / "model.onnx"))
    server.setup("cpu")
    content = image_bytes(1, (50, 41), "PNG")
    pixels = server.decode_request({"image": base64.b64encode(content).decode()})
    told = server.encode_response(server.predict(pixels))
    predictor = open_predictor(model)
    wanted = predictor.probabilities(predictor.prepare(content)[None])[0]
    np.testing.assert_allclose(list(told["probabilities"].values()), wanted, atol=1e-6)


def times(factor, graphs):
    """The graphs, with a layer whose weights are multiplied."""
    broken = copy.deepcopy(graphs)
    weight = next(each for each in broken.batch.graph.initializer if "layer3.0.conv1" in each.name)
    changed = onnx.numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    return broken


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_where_they_part_is_named_and_nothing_is_written(
    graphs, model, dataset, tmp_path, monkeypatch, capsys, factor
):
    broken = times(factor, graphs)
    monkeypatch.setattr(story, "make_onnx", lambda graph: broken)
    assert export(model, tmp_path / "out", "onnx", "--data", dataset) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "does not say what the model says" in told
    assert "part at trunk.layer3.0" in told
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_batches_is_checked_as_it_lies_on_the_disk(
    graphs, model, dataset, tmp_path, monkeypatch, capsys
):
    broken, save = times(1.5, graphs).batch, story.save_onnx

    def saved(model, path, metadata):
        save(broken if path.name == "batch.onnx" else model, path, metadata)

    monkeypatch.setattr(story, "make_onnx", lambda graph: copy.deepcopy(graphs))
    monkeypatch.setattr(story, "save_onnx", saved)
    assert export(model, tmp_path / "out", "onnx", "--data", dataset) == 1
    assert "onnx says something else in batches: of 1, from image 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_view_of_other_pixels_is_found_too(graphs, model, dataset, tmp_path, monkeypatch, capsys):
    broken = copy.deepcopy(graphs)
    round_ = next(node for node in broken.view.graph.node if node.op_type == "Round")
    round_.op_type = "Floor"  # the middle is cut out half a pixel beside
    monkeypatch.setattr(story, "make_onnx", lambda graph: broken)
    assert export(model, tmp_path / "out", "onnx", "--data", dataset) == 1
    assert "they part at the resize and crop" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_it_does_not_take_is_named(
    graphs, model, dataset, tmp_path, monkeypatch, capsys
):
    broken = copy.deepcopy(graphs)
    image = broken.view.graph.input[0].type.tensor_type.shape
    image.dim[0].dim_value = 16  # as an exporter that fixes what it was traced with
    monkeypatch.setattr(story, "make_onnx", lambda graph: broken)
    assert export(model, tmp_path / "out", "onnx", "--data", dataset) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "does not take" in told
    assert "(1 x 1 pixels)" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced")
def test_eight_bits_are_gated_by_what_they_lose(model, dataset, tmp_path, capsys):
    words = ("onnx", "--int8", "--data", dataset)
    assert export(model, tmp_path / "no", *words, "--int8-loss", "-1") == 1
    assert "more than --int8-loss -1. Nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out = tmp_path / "x.onnx"
    assert export(model, out, *words, "--int8-loss", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in told["formats"]}
    assert rows["onnx int8"]["size"] < 0.6 * rows["onnx"]["size"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"x.onnx", "x.batch.onnx", "x.json", "example.py"}
    assert open_model(out).classes == CLASSES
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert "DequantizeLinear" in kinds


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("torchscript",), "torchscript is not offered: PyTorch deprecated it"),
        (("onx",), "no format 'onx'; there are onnx, pt2, timm, hf"),
        (("pt2", "--int8"), "--int8 goes with --format onnx"),
        (("onnx", "--int8", "--images", "{images}"), "give --data DATASET instead of --images"),
        (("onnx",), "checked on real images before it is written: give --data"),
        (("onnx", "--images", "{empty}"), "holds no image"),
        (("onnx", "--data", "{data}", "--limit", "3"), "at least 200 images"),
        (("onnx", "--data", "{data}", "--images", "{images}"), "give one of them"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(model, dataset, tmp_path, capsys, words, told):
    (tmp_path / "empty").mkdir()
    places = {
        "empty": tmp_path / "empty",
        "data": dataset,
        "images": dataset.parent / "images" / "val",
    }
    format, *rest = (word.format(**places) for word in words)
    try:
        code = export(model, tmp_path / "out", format, *rest)
    except SystemExit as left:  # the parser's
        code = left.code
    assert code == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_an_export_is_not_exported_again(exported, tmp_path, capsys):
    assert export(exported, tmp_path / "out", "pt2") == 2
    assert "is exported already: give the run" in capsys.readouterr().err


def test_nothing_is_overwritten(model, dataset, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert export(model, tmp_path / "there", "onnx", "--data", dataset) == 2
    assert "exists; remove it" in capsys.readouterr().err
    (tmp_path / "x.batch.onnx").touch()
    assert export(model, tmp_path / "x.onnx", "onnx", "--data", dataset) == 2
    assert "x.batch.onnx exists" in capsys.readouterr().err
    assert export(model, tmp_path / "x.pt2", "onnx", "--data", dataset) == 2
    assert "the ending of another format" in capsys.readouterr().err


@pytest.mark.usefixtures("traced")
def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'rtl_dist\[export\]'"):
        require_onnx()


class Odd(torch.nn.Module):
    """Does what ONNX has no word for."""

    def forward(self, images):
        return torch.special.airy_ai(images.mean((2, 3)))


def test_an_operation_that_cannot_be_written_is_named(model):
    loaded = load_model(model)
    loaded.model.trunk = Odd()
    loaded.model.head = torch.nn.Linear(3, 3)
    loaded.model.head.fold = lambda: None
    with pytest.raises(UserError, match=r"the operation aten.special_airy_ai"):
        make_batch_onnx(BatchGraph(loaded))


def test_a_pt2_file_of_a_grey_multi_label_model(dataset, tmp_path):
    calibration = dataclasses.replace(FITTED, thresholds=(0.2, 0.5, 0.9))
    folder = model_folder(
        tmp_path / "m", "basic_cnn", channels=1, task=MULTI_LABEL, calibration=calibration
    )
    out = tmp_path / "x.pt2"
    images = dataset.parent / "images" / "val"
    assert export(folder, out, "pt2", "--images", images) == 0
    predictor, of_file = open_predictor(folder), open_predictor(out)
    assert of_file.calibration == calibration
    views = torch.stack([predictor.prepare(file) for file in images_of(dataset)])
    np.testing.assert_allclose(
        of_file.probabilities(views), predictor.probabilities(views), atol=1e-6
    )
    assert str(Path(story.__file__).parent).encode() not in out.read_bytes()
