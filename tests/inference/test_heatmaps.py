"""The map of a class: its mean is the score where it can be, and it peaks at what is looked for."""

import numpy as np
import pytest
import torch
from torch import nn

from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.errors import UserError
from rtl_dist.inference.heatmaps import heatmaps
from rtl_dist.model.build import make_classifier
from rtl_dist.model.classifier import Classifier, Preprocessing
from rtl_dist.model.head import Head


def network(name, size=64, **options):
    """Of random weights, none of which is zero or one as layers begin."""
    model = make_classifier(
        ModelConfig(name=name, weights="none", **options),
        DataConfig(path="x", image_size=size),
        num_classes=4,
        seed=0,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.ndim == 1 and value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator) / 4)
    return model


def pictures(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def logits(model, images, classes):
    with torch.no_grad():
        return model(images).gather(1, torch.tensor(classes)[:, None])[:, 0].numpy()


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("basic_cnn", "layer3", 8),
        ("test_resnet", "layer4", 2),
        ("torchvision:mobilenet_v2", "features", 2),  # it pools by a function, not by a layer
    ],
)
def test_behind_an_average_the_maps_mean_and_the_bias_are_the_score(name, layer, side):
    model, classes = network(name), [3, 0, 1] * 6  # more than are computed at once
    images = pictures(len(classes), 64)
    found = heatmaps(model, images, classes)
    assert found.layer == layer
    assert found.maps.shape == (len(classes), side, side)
    assert found.maps.dtype == np.float32
    assert found.exact.all()
    scores = logits(model, images, classes)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-4)
    bias = model.head.bias.detach().numpy()[classes]
    np.testing.assert_allclose(found.maps.mean((1, 2)) + bias, scores, rtol=1e-4, atol=1e-4)
    assert not any(p.grad is not None for p in model.parameters())
    np.testing.assert_allclose(found.spread.mean((1, 2)), scores, rtol=1e-4, atol=1e-4)


def test_it_is_the_class_activation_map_of_the_literature():
    model, images = network("basic_cnn"), pictures(2, 64)
    activations = []
    hook = model.trunk.layer3.register_forward_hook(lambda m, i, out: activations.append(out))
    with torch.no_grad():
        model(images)
    hook.remove()
    expected = torch.einsum("nchw,nc->nhw", activations[0], model.head.weight[[2, 1]])
    np.testing.assert_allclose(
        heatmaps(model, images, [2, 1]).maps, expected.detach().numpy(), rtol=1e-4, atol=1e-5
    )


def test_against_the_others_a_place_that_speaks_for_all_says_nothing():
    model, images = network("basic_cnn"), pictures(2, 64)
    of_each = [heatmaps(model, images, [k, k]).maps for k in range(4)]
    found = heatmaps(model, images, [2, 2], against_others=True)
    np.testing.assert_allclose(found.maps, of_each[2] - np.mean(of_each, axis=0), atol=1e-4)
    assert found.exact.all()
    with torch.no_grad():
        model.head.weight.add_(torch.rand(128))  # for all classes alike
        model.head.bias.add_(3.0)
    again = heatmaps(model, images, [2, 2], against_others=True)
    np.testing.assert_allclose(again.maps, found.maps, atol=1e-4)


def test_spread_over_the_places_a_value_is_the_score_of_a_picture_of_that_place_alone():
    """As of a network without borders: a picture of one colour on the left, of another right."""
    conv = nn.Conv2d(3, 5, 1)
    model = own(nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 5)
    images = torch.full((3, 3, 16, 16), 30, dtype=torch.uint8)
    images[1] = 220
    images[2, :, :, 8:] = 220
    left, right = logits(model, images[:2], [1, 1])
    found = heatmaps(model, images[2:], [1]).spread[0]
    np.testing.assert_allclose(found[:, :8], left, rtol=1e-4)
    np.testing.assert_allclose(found[:, 8:], right, rtol=1e-4)


def test_a_head_that_standardises_counts_as_the_plain_one_it_is():
    model, images = network("basic_cnn"), pictures(2, 64)
    before = heatmaps(model, images, [0, 1]).maps
    model.head.standardize(torch.full((128,), 0.3), torch.tensor(2.0))
    after = heatmaps(model, images, [0, 1])
    assert after.exact.all()
    np.testing.assert_allclose(after.maps, before, rtol=1e-3, atol=1e-5)


def test_where_something_else_lies_behind_the_places_it_says_so():
    """A class token, whose last block no place but its own leaves, and a norm of what is pooled."""
    images = pictures(2, 160)
    found = heatmaps(network("test_vit", 160), images, [0, 1])
    assert found.maps.shape == (2, 10, 10)
    assert not found.exact.any()
    assert np.abs(found.maps).max() > 0
    assert not heatmaps(network("test_convnext", 160), images, [0, 1]).exact.any()


class _ChannelsLast(nn.Module):
    """As Swin's and others' layers."""

    def forward(self, images):
        return images.permute(0, 2, 3, 1)


class _Tokens(nn.Module):
    """As a vision transformer's: one that is of no place, then those of places."""

    def forward(self, images):
        tokens = images.flatten(2).mT
        return torch.cat([torch.full_like(tokens[:, :1], 9.0), tokens], 1)


class _MeanOfTokens(nn.Module):
    def forward(self, tokens):
        return tokens[:, 1:].mean(1)


class _Mean(nn.Module):
    def forward(self, images):
        return images.mean((1, 2))


def own(trunk, features, size=16):
    view = Preprocessing(image_size=size, crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Classifier(trunk, Head(features, 2), native_head="fc", preprocessing=view)


def test_channels_may_be_last_places_tokens_and_a_relu_may_change_what_it_is_given():
    conv = nn.Conv2d(3, 5, 3)
    last = own(nn.Sequential(conv, nn.ReLU(inplace=True), _ChannelsLast(), _Mean()), 5)
    first = own(nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 5)
    tokens = own(nn.Sequential(conv, nn.ReLU(), _Tokens(), _MeanOfTokens()), 5)
    images = pictures(3, 16)
    expected = heatmaps(first, images, [0, 1, 0])
    for model, layer in ((last, "2"), (tokens, "2")):
        model.head.load_state_dict(first.head.state_dict())
        found = heatmaps(model, images, [0, 1, 0])
        assert found.layer == layer
        assert found.exact.all()
        np.testing.assert_allclose(found.maps, expected.maps, atol=1e-6)


def test_a_network_without_places_is_refused():
    model = own(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)), 5)
    with pytest.raises(UserError, match=r"no heatmap can be made: no layer of this network"):
        heatmaps(model, pictures(1, 16), [0])


def planted(count, generator):
    """Grey noise of 32 pixels; half the images hold a red square of 8, at a place of 4 x 4."""
    images = torch.randint(90, 166, (count, 1, 32, 32), generator=generator).expand(-1, 3, -1, -1)
    images, places = images.clone(), torch.randint(0, 4, (count, 2), generator=generator)
    labels = torch.arange(count) % 2
    for image, (row, column), label in zip(images, places.tolist(), labels, strict=True):
        if label:
            patch = torch.tensor([230, 40, 40]).view(3, 1, 1)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = patch
    return images.to(torch.uint8), labels, places


def test_the_map_of_a_class_peaks_at_the_patch_that_makes_it():
    generator = torch.Generator().manual_seed(0)
    model = make_classifier(
        ModelConfig(name="basic_cnn", weights="none"),
        DataConfig(path="x", image_size=32),
        num_classes=2,
        seed=0,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        images, labels, _ = planted(16, generator)
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels, places = planted(40, generator)
    found = heatmaps(model, images, [1] * 40)
    assert ((found.scores > 0) == (labels == 1).numpy()).mean() > 0.9
    of_patch = (labels == 1).numpy()
    peaks = found.maps[of_patch].reshape(20, -1).argmax(1)
    expected = places[of_patch].numpy() @ [4, 1]
    assert (peaks == expected).mean() > 0.9
    against = heatmaps(model, images, [0] * 40).maps[of_patch].reshape(20, -1)
    assert (against.argmin(1) == expected).mean() > 0.9  # and speaks against the other class
