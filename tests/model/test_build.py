"""A network by its name: every kind has one shape, a seed names its weights."""

import logging

import pytest
import timm
import torch
import torchvision
from networks import CLASSES, NAMES, RESNET_PARTS, classifier, pixels

from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.errors import UserError
from rtl_dist.model.build import build_model
from rtl_dist.model.freezing import digest
from rtl_dist.model.parts import parts_of


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_network_has_one_shape(name, channels):
    model = classifier(name, channels=channels).eval()
    images = pixels(channels=channels)
    features, scores = model.features(images), model(images)
    assert features.shape == (4, model.head.in_features)
    assert scores.shape == (4, 3)
    assert torch.equal(model.classify(features), scores)
    normal = (images.float() / 255 - model.mean) / model.std
    torch.testing.assert_close(model.trunk(normal), features, rtol=1e-4, atol=1e-4)
    assert images.dtype == torch.uint8
    assert torch.equal(images, pixels(channels=channels))  # the caller's pixels are as they were
    assert list(parts_of(model)) == (
        ["layer1", "layer2", "layer3", "head"] if name == "basic_cnn" else RESNET_PARTS
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_names_the_weights(name):
    torch.rand(1)
    one = digest(classifier(name).state_dict())
    torch.rand(1)
    assert digest(classifier(name).state_dict()) == one
    assert digest(classifier(name, seed=1).state_dict()) != one


def test_the_head_does_not_depend_on_what_the_trunk_drew():
    heads = [classifier("torchvision:resnet18"), classifier("resnet18", channels=1)]
    assert torch.equal(heads[0].head.weight, heads[1].head.weight)


def test_grey_input_is_what_the_same_grey_in_colour_is():
    """The first kernel is summed over the colours, so a colour network sees grey as before."""
    colour = classifier("torchvision:resnet18").eval()
    grey = classifier("torchvision:resnet18", channels=1).eval()
    assert grey.trunk.conv1.weight.shape == (64, 1, 7, 7)
    plane = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey.trunk(plane), colour.trunk(plane.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "timm has no model 'resnet5O'; did you mean resnet50?"),
        ("resnet18.x", "timm has no weights 'x' of resnet18; it has resnet18.a1_in1k, resnet18.a2"),
        ("torchvision:resnet5O", "torchvision has no classifier 'resnet5O'; did you mean torchvis"),
        ("torchvision:", "torchvision has no classifier ''"),
        ("!", "timm has no model '!'"),
        ("torchvision:fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, message):
    with pytest.raises(UserError, match=f"model.name: {message}"):
        classifier(name)


@pytest.mark.parametrize(
    ("name", "tag"),
    [("resnet18", "a1_in1k"), ("resnet18.a1_in1k", "a1_in1k"), ("resnet18.tv_in1k", "tv_in1k")],
)
def test_a_tag_chooses_the_weights(name, tag, monkeypatch):
    """timm's bare name means its own newest training; a tag asks for another one's."""
    asked = []

    def fetch(place, *arguments, **options):
        asked.append(place)
        torch.manual_seed(7)
        return timm.create_model("resnet18").state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    config = ModelConfig(name=name, weights="pretrained")
    model, origin = build_model(config, DataConfig(path=""), classes=CLASSES, seed=0)
    assert [place.split("@")[0] for place in asked] == [f"timm/resnet18.{tag}"]
    assert origin == f"pretrained weights of {name}"
    torch.manual_seed(7)
    assert torch.equal(model.trunk.conv1.weight, timm.create_model("resnet18").conv1.weight)


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_weights_that_cannot_be_fetched_are_refused_in_one_line(name, monkeypatch, caplog):
    def offline(*arguments, **options):
        if not name.startswith("torchvision:"):  # the hub's client tries a dozen times, aloud
            logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no network\nand a second line")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    config = ModelConfig(name=name, weights="pretrained")
    with pytest.raises(
        UserError, match=rf"cannot fetch pretrained weights of {name} \(no netw"
    ) as e:
        build_model(config, DataConfig(path=""), classes=CLASSES, seed=0)
    assert "\n" not in str(e.value)
    assert "Retry" not in caplog.text


def test_basic_cnn_has_no_pretrained_weights():
    with pytest.raises(UserError, match="basic_cnn has no pretrained weights; set it to none"):
        build_model(ModelConfig(name="basic_cnn"), DataConfig(path=""), classes=CLASSES, seed=0)
