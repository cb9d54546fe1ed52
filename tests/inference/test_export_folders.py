"""Exports that timm and transformers load, and the card that comes with them."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import yaml
from exported_models import export, images_of, loaded_model, model_folder
from PIL import Image
from tiny_runs import CLASSES, make_dataset, tiny_config

from rtl_dist.config import parse_config, to_dict
from rtl_dist.core.errors import UserError
from rtl_dist.evaluation.metrics import wilson_interval
from rtl_dist.inference.export import export as story
from rtl_dist.inference.export.card import card_of
from rtl_dist.inference.export.folder_runner import TimmRunner
from rtl_dist.inference.export.folders import require_timm_knows
from rtl_dist.inference.export.origin import origin_of
from rtl_dist.inference.opening import open_predictor
from rtl_dist.model.folder import load_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "m")


def test_a_folder_for_transformers_is_loaded_by_a_pipeline_and_by_timm(
    model, dataset, tmp_path, capsys
):
    import timm
    from transformers import pipeline

    out = tmp_path / "hf"
    assert export(model, out, "hf", "--data", dataset, "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["formats"][1]["max_difference"] < 0.02
    files = images_of(dataset)[:3]
    predictor = open_predictor(model)
    views = torch.stack([predictor.prepare(file) for file in files])
    wanted = predictor.probabilities(views)
    classify = pipeline("image-classification", model=str(out), device="cpu")
    for file, expected in zip(files, wanted, strict=True):
        scores = {each["label"]: each["score"] for each in classify(Image.open(io.BytesIO(file)))}
        assert [scores[name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=0.02)
    network = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    config = network.pretrained_cfg
    pixels = (views / 255 - torch.tensor(config["mean"]).view(1, 3, 1, 1)) / torch.tensor(
        config["std"]
    ).view(1, 3, 1, 1)
    with torch.inference_mode():  # the temperature is in the head
        found = network(pixels).softmax(1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    again = open_predictor(out)
    assert again.calibration.temperature == 1
    np.testing.assert_allclose(again.probabilities(views), wanted, atol=1e-5)


def test_the_card_tells_what_was_measured(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(story, "TransformersRunner", lambda *given: TimmRunner(*given[:3]))
    out = tmp_path / "hf"
    assert export(model, out, "hf", "--data", dataset) == 0
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "image-classification"
    top1 = json.loads((out / "export.json").read_text())["formats"][1]["metric"]
    low, high = wilson_interval(round(top1 * 15), 15)
    assert f"| top-1 accuracy | {top1:.4f} | {low:.3f} to {high:.3f} |" in card
    assert all(f"| {name} | 5 |" in card for name in CLASSES)
    assert "a temperature of 1.7" in card
    assert "data of fingerprint `made up`" in card
    assert "exported without the folder of its run" in card
    assert "fewer than 30 images: blue (5), green (5), red (5)" in card
    assert "flatter" not in card  # of the test split


def test_another_layer_is_named_and_nothing_is_written(
    model, dataset, tmp_path, monkeypatch, capsys
):
    class Spoilt(TimmRunner):
        def __init__(self, *given):
            super().__init__(*given)
            self.model.layer2[0].conv1.weight.data *= 1.5

    monkeypatch.setattr(story, "TimmRunner", Spoilt)
    assert export(model, tmp_path / "out", "timm", "--data", dataset) == 1
    assert "they part at trunk.layer2.0.conv1 (" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_how_to_make_it_again(tmp_path):
    config = parse_config(tiny_config(tmp_path / "secret-place", tmp_path, model__weights="none"))
    write_yaml(tmp_path / "config.yaml", to_dict(config))
    origin = origin_of(str(tmp_path))
    assert origin.weights == "none: basic_cnn began with random weights"
    again = yaml.safe_load(origin.training)
    assert [stage["name"] for stage in again["stages"]] == ["head", "top", "all"]
    assert "secret-place" not in origin.training
    changed = to_dict(config) | {"model": {"name": "resnet50.fb_swsl_ig1b_ft_in1k"}}
    write_yaml(tmp_path / "config.yaml", changed)
    origin = origin_of(str(tmp_path))
    assert (origin.licence, origin.base) == ("cc-by-nc-4.0", "timm/resnet50.fb_swsl_ig1b_ft_in1k")


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("format", "name", "channels", "options", "told"),
    [
        ("timm", "basic_cnn", 3, {}, "timm has no network 'basic_cnn'"),
        ("timm", "resnet18", 3, {"small_stem": True}, "a network that timm has no name for"),
        ("hf", "test_resnet", 1, {}, "makes every image a colour one"),
    ],
)
def test_what_others_cannot_load_is_refused(model, format, name, channels, options, told):
    loaded = loaded_model(model, name, channels=channels, **options)
    with pytest.raises(UserError, match=told):
        require_timm_knows(loaded, format)


def test_a_class_name_is_text_in_the_card_and_nothing_more(model, dataset):
    loaded = dataclasses.replace(load_model(model), classes=("<b>a|b", "`x`", "[y](z)\n# q"))
    card = card_of(loaded, origin_of("nowhere"), None, source="s", fingerprint="f")
    assert "<b>" not in card
    assert "\n# q" not in card
    assert "Not measured" in card
