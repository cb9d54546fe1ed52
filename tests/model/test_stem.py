"""The stem for small images: which networks have it, what becomes of weights, where it travels."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import CLASSES, RESNET_PARTS, classifier, moved_statistics, pixels, stage
from safetensors.torch import load_file, save_file
from torch import nn

from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.errors import UserError
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import DatasetPlace
from rtl_dist.model.build import build_model
from rtl_dist.model.divided import divide
from rtl_dist.model.folder import load_model, write_model_folder
from rtl_dist.model.freezing import digest, freeze_for
from rtl_dist.model.parts import first_trainable_part, parts_of
from rtl_dist.model.stem import small_kernel
from rtl_dist.model.weights import load_weights

KINDS = ["resnet18", "torchvision:resnet18"]


def small(name="resnet18", **options):
    return moved_statistics(classifier(name, small_stem=True, **options)).eval()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_a_3_by_3_convolution_of_stride_1_without_pooling(name, channels):
    model, usual = small(name, channels=channels), classifier(name, channels=channels)
    conv = model.trunk.conv1
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    assert conv.weight.shape == (64, channels, 3, 3)
    assert conv.bias is None
    sizes = []
    model.trunk.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    assert model(pixels(channels=channels)).shape == (4, 3)
    assert sizes == [(4, 64, 32, 32)]  # every pixel is still there
    own, theirs = model.state_dict(), usual.state_dict()
    assert own.keys() == theirs.keys()
    changed = {key for key in own if own[key].shape != theirs[key].shape}
    assert changed == {"trunk.conv1.weight"}
    assert torch.equal(own["head.weight"], theirs["head.weight"])
    # of the size that BatchNorm's first layer and all above expect (He initialisation)
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_a_seed_names_its_weights():
    assert digest(small().state_dict()) == digest(small().state_dict())
    assert digest(small(seed=1).state_dict()) != digest(small().state_dict())


@pytest.mark.parametrize(
    "name",
    ["basic_cnn", "test_resnet", "resnet18d", "torchvision:densenet121", "mobilenetv3_small_050"],
)
def test_a_network_that_does_not_begin_so_is_refused_by_name(name):
    message = (
        f"model.small_stem: {name} does not begin with one 7 x 7 convolution and a max pooling"
    )
    with pytest.raises(UserError, match=message) as caught:
        classifier(name, small_stem=True)
    assert "\n" not in str(caught.value)


# --- weights of the usual stem ---


def test_the_kernel_answers_as_the_large_one_does_to_the_image_enlarged():
    large = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
    kernel = small_kernel(large)
    torch.testing.assert_close(kernel.sum((2, 3)), large.sum((2, 3)))
    # a slope is enlarged to a slope, whatever lies further out
    rows = torch.arange(9.0).view(1, 1, 9, 1).expand(1, 3, 9, 9)
    for image in (rows, rows.mT, rows + 2 * rows.mT):
        enlarged = F.interpolate(image, scale_factor=4, mode="bilinear")
        answers = F.avg_pool2d(F.conv2d(enlarged, large, padding=3), 4)
        found = F.conv2d(image, kernel, padding=1)
        inside = (..., slice(2, -2), slice(2, -2))
        torch.testing.assert_close(found[inside], answers[inside], rtol=0.05, atol=0.5)
    assert small_kernel(large.double()).dtype == torch.float64


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_weights_of_the_usual_stem_load_but_for_the_kernel(tmp_path, name, channels):
    source = moved_statistics(classifier(name, seed=3))
    save_file(source.native_state_dict(), tmp_path / "usual.safetensors")
    model = classifier(name, channels=channels, small_stem=True)
    load_weights(model, str(tmp_path / "usual.safetensors"), head="auto", classes=CLASSES)
    own, theirs = model.trunk.state_dict(), source.trunk.state_dict()
    expected = small_kernel(theirs.pop("conv1.weight"))
    expected = expected.sum(1, keepdim=True) if channels == 1 else expected
    torch.testing.assert_close(own.pop("conv1.weight"), expected)
    assert digest(own) == digest(theirs)


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_the_hub_are_treated_alike(monkeypatch, channels):
    """With what torchvision would have fetched."""
    usual = moved_statistics(classifier("torchvision:resnet18", seed=3)).trunk.state_dict()

    def fetched(name, weights):
        assert weights == "DEFAULT"
        model = torchvision.models.resnet18()
        model.load_state_dict(usual, strict=False)
        return model

    monkeypatch.setattr(torchvision.models, "get_model", fetched)
    config = ModelConfig(name="torchvision:resnet18", small_stem=True)
    data = DataConfig(path="", image_size=32, channels=channels)
    model, _ = build_model(config, data, classes=CLASSES, seed=0)
    expected = small_kernel(usual["conv1.weight"])
    expected = expected.sum(1, keepdim=True) if channels == 1 else expected
    torch.testing.assert_close(model.trunk.conv1.weight.data, expected)
    assert torch.equal(model.trunk.layer4[1].conv2.weight.data, usual["layer4.1.conv2.weight"])


def test_weights_of_the_small_stem_load_as_they_are_and_into_no_other(tmp_path):
    source = small(seed=3)
    save_file(source.native_state_dict(), tmp_path / "small.safetensors")
    model = classifier("resnet18", small_stem=True)
    load_weights(model, str(tmp_path / "small.safetensors"), head="auto", classes=CLASSES)
    assert digest(model.trunk.state_dict()) == digest(source.trunk.state_dict())
    with pytest.raises(UserError, match=r"conv1.weight \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)"):
        load_weights(
            classifier("resnet18"),
            str(tmp_path / "small.safetensors"),
            head="auto",
            classes=CLASSES,
        )


# --- parts, halves ---


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("trainable", ["head", "layer4+", "layer1+", "all"])
def test_it_is_frozen_and_cut_as_the_usual_one(name, trainable):
    model = small(name)
    assert list(parts_of(model)) == RESNET_PARTS
    chosen = stage(trainable=trainable)
    freeze_for(model, chosen)
    assert model.trunk.conv1.weight.requires_grad == (trainable == "all")
    halves = divide(model.eval(), first_trainable_part(model, chosen), dtype=None)
    assert (halves.frozen is None) == (trainable == "all")
    images = pixels()
    inputs = images if halves.frozen is None else halves.frozen(images)
    torch.testing.assert_close(halves.trained(inputs), model(images), rtol=1e-4, atol=1e-4)


def test_features_of_another_stem_are_of_another_network():
    usual, other = (divide(m.eval(), "head", dtype=None).frozen for m in
                    (classifier("resnet18"), classifier("resnet18", small_stem=True)))  # fmt: skip
    assert usual.describe() != other.describe()


# --- a model folder ---


def written(folder, name, channels=3, *, small_stem=True):
    data = DataConfig(path="", image_size=32, channels=channels, crop_pct=0.9)
    config = ModelConfig(name=name, weights="none", small_stem=small_stem)
    model, _ = build_model(config, data, classes=CLASSES, seed=1)
    dataset = Dataset(
        place=DatasetPlace(where=""),
        task="single_label",
        classes=CLASSES,
        fingerprint="f" * 64,
        description={},
    )
    moved_statistics(model).eval()
    write_model_folder(folder, model, config, dataset, precision="no")
    return model


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_it_travels_with_the_model_folder(tmp_path, name, channels):
    model = written(tmp_path, name, channels)
    loaded = load_model(tmp_path).model.eval()
    assert digest(loaded.state_dict()) == digest(model.state_dict())
    images = pixels(channels=channels)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("small_stem", [False, True])
def test_a_folder_speaks_of_no_stem_but_the_small_one(tmp_path, small_stem):
    written(tmp_path, "resnet18", small_stem=small_stem)
    description = json.loads((tmp_path / "config.json").read_text())
    own = {"small_stem": True} if small_stem else {}
    assert description["rtl_dist"]["model"] == {"name": "resnet18", "dropout": 0.0, **own}


def test_timm_refuses_the_folder_and_the_documented_lines_load_it(tmp_path):
    """timm has no argument for this stem; what must not happen is another network without a word."""
    model, folder = written(tmp_path, "resnet18"), tmp_path
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)

    theirs = timm.create_model(f"local-dir:{folder}", pretrained=False)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(load_file(f"{folder}/model.safetensors"))
    settings = timm.data.resolve_model_data_config(theirs)
    mean = torch.tensor(settings["mean"]).view(1, -1, 1, 1)
    std = torch.tensor(settings["std"]).view(1, -1, 1, 1)
    images = pixels()
    with torch.inference_mode():
        found = theirs.eval()((images.float() / 255 - mean) / std)
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)
