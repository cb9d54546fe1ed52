"""The classifier cut below its first trained part: the same scores, and the same training."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.config import DataConfig, ModelConfig, StageConfig
from rtl_dist.model.build import make_classifier
from rtl_dist.model.classifier import Classifier, Preprocessing
from rtl_dist.model.divided import divide
from rtl_dist.model.freezing import freeze_for
from rtl_dist.model.head import Head
from rtl_dist.model.parts import parts_of

RESNET = ["layer1", "layer2", "layer3", "layer4", "head"]
CUTS = [
    (name, boundary)
    for name in ("resnet18", "torchvision:resnet50", "test_resnet", "seresnet18")
    for boundary in RESNET
] + [("basic_cnn", boundary) for boundary in ("layer2", "layer3", "head")]


@cache
def built(name: str) -> Classifier:
    data = DataConfig(path="x", image_size=32)
    model = make_classifier(ModelConfig(name=name, weights="none"), data, num_classes=3, seed=0)
    return randomised(model).eval()


def network(name: str = "test_resnet") -> Classifier:
    return copy.deepcopy(built(name))


def randomised(model: Classifier) -> Classifier:
    """With BatchNorm layers that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for norm in norms(model):
        for tensor in (norm.weight, norm.running_var):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        for tensor in (norm.bias, norm.running_mean):
            tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return model


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 32, 32), generator=generator).to(torch.uint8)


def assert_same(found: torch.Tensor, expected: torch.Tensor, *, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("name", "boundary"), CUTS)
def test_the_halves_make_the_whole(name, boundary):
    model = network(name)
    divided = divide(model, boundary, dtype=None)
    assert divided.frozen is not None
    with torch.no_grad():
        assert_same(divided.trained(divided.frozen(pixels())), model(pixels()))


@pytest.mark.parametrize(("name", "boundary"), CUTS)
def test_folding_leaves_no_batchnorm_below_and_all_of_it_above(name, boundary):
    model = network(name)
    names = list(parts_of(model))
    below = names[: names.index(boundary)]
    num_below = sum(len(norms(root)) for part in below for root in parts_of(model)[part])
    divided = divide(model, boundary, dtype=None)
    assert num_below > 0
    assert norms(divided.frozen) == []
    assert len(norms(divided.trained)) == len(norms(model)) - num_below
    assert len(norms(model)) == len(norms(built(name)))  # the model itself is as it was


@pytest.mark.parametrize("name", ["resnet18", "basic_cnn"])
def test_with_all_of_it_trained_nothing_is_cut(name):
    model = network(name)
    divided = divide(model, next(iter(parts_of(model))), dtype=None)
    assert divided.frozen is None
    assert divided.trained is model


@pytest.mark.parametrize("boundary", RESNET)
@pytest.mark.parametrize("name", ["test_resnet", "seresnet18"])
def test_the_frozen_half_is_a_copy_without_autograd(name, boundary):
    model = network(name)
    frozen = divide(model, boundary, dtype=None).frozen
    before = frozen(pixels())
    assert not before.requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())
    mine = {p.data_ptr() for p in frozen.parameters()}
    assert mine
    assert not mine & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.add_(1)
    assert torch.equal(frozen(pixels()), before)


@pytest.mark.parametrize("boundary", RESNET)
def test_the_trained_half_is_the_model_s_own(boundary):
    model = network()
    divided = divide(model, boundary, dtype=None)
    activations = divided.frozen(pixels())
    before = divided.trained(activations)
    assert {id(p) for p in divided.trained.parameters()} <= {id(p) for p in model.parameters()}
    with torch.no_grad():
        next(parts_of(model)[boundary][0].parameters()).add_(0.5)
    assert not torch.equal(divided.trained(activations), before)


@pytest.mark.parametrize("boundary", RESNET)
def test_gradients_arrive_in_the_boundary_and_above_and_nowhere_else(boundary):
    model = network().double()
    stage = StageConfig(name="s", epochs=1, lr=0.1, trainable=f"{boundary}+", batchnorm="train")
    freeze_for(model, stage)
    whole = copy.deepcopy(model)
    divided = divide(model, boundary, dtype=None)
    labels = torch.tensor([0, 1, 2])
    F.cross_entropy(divided.trained(divided.frozen(pixels())), labels).backward()
    F.cross_entropy(whole(pixels()), labels).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(whole.named_parameters())
    for name in reached:
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name].grad)
    for name, value in whole.named_buffers():  # BatchNorm in the trained half learns the same
        torch.testing.assert_close(model.get_buffer(name), value)


def test_modes_reach_the_trained_half():
    """The stage sets them on the model, whichever half is run."""
    model = make_classifier(
        ModelConfig(name="test_resnet", weights="none", dropout=0.5),
        DataConfig(path="x", image_size=32), num_classes=3, seed=0,
    )  # fmt: skip
    for boundary in RESNET:
        divided = divide(model.eval(), boundary, dtype=None)
        activations = divided.frozen(pixels())
        before = divided.trained(activations)
        assert torch.equal(divided.trained(activations), before)
        model.train()
        assert not torch.equal(divided.trained(activations), divided.trained(activations))
        assert torch.equal(divided.frozen(pixels()), activations)


@pytest.mark.parametrize("boundary", RESNET)
def test_frozen_convolutions_are_kept_in_the_precision_they_are_multiplied_in(boundary):
    model = network()
    divided = divide(model, boundary, dtype=torch.bfloat16)
    kernels = [m for m in divided.frozen.modules() if isinstance(m, nn.Conv2d)]
    assert kernels
    assert {p.dtype for m in kernels for p in m.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = divided.trained(divided.frozen(pixels()))
    assert_same(found, model(pixels()).detach(), tolerance=0.05)


@pytest.mark.parametrize("boundary", RESNET)
def test_float64_is_float64_all_the_way(boundary):
    model = network().double()
    divided = divide(model, boundary, dtype=None)
    with torch.no_grad():
        activations = divided.frozen(pixels())
        assert activations.dtype == torch.float64
        assert_same(divided.trained(activations), model(pixels()), tolerance=1e-13)


# --- networks that cannot be cut -------------------------------------------------------------


class Trunk(nn.Module):
    """Two layers, and a subclass's way through them; 3 x S x S to 4 features."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.through(self.stem(x)).mean((2, 3))

    def through(self, x):
        return self.layer2(self.layer1(x).relu())


class DependsOnData(Trunk):
    def through(self, x):
        x = self.layer1(x)
        return self.layer2(x if x.sum() > 0 else -x)


class TwoCross(Trunk):
    def through(self, x):
        return self.layer2(self.layer1(x)) + x


class UsedTwice(Trunk):
    def through(self, x):
        return self.layer1(self.layer2(self.layer1(x)))


class AroundNorm(Trunk):
    def through(self, x):
        x = self.layer1[0](x)
        return self.layer2(self.layer1[1](x) + x)


class OwnTensor(Trunk):
    def __init__(self):
        super().__init__()
        self.shift = nn.Buffer(torch.randn(4, 1, 1))

    def through(self, x):
        return self.layer2(self.layer1(x) + self.shift)


class DependsOnMode(Trunk):
    def through(self, x):
        x = self.layer2(self.layer1(x))
        return F.dropout(x, 0.5, training=self.training)


def classifier(trunk: Trunk) -> Classifier:
    preprocessing = Preprocessing(image_size=32, crop_pct=1.0, mean=(0.5,) * 3, std=(0.2,) * 3)
    model = Classifier(trunk, Head(4, 3), native_head="fc", preprocessing=preprocessing)
    return randomised(model).eval()


def test_a_plain_one_is_cut():
    model = classifier(Trunk())
    for boundary in ("layer1", "layer2", "head"):
        divided = divide(model, boundary, dtype=None)
        assert norms(divided.frozen) == []
        assert_same(divided.trained(divided.frozen(pixels())), model(pixels()))


@pytest.mark.parametrize(
    ("trunk", "boundary"),
    [
        (DependsOnData, "layer1"),
        (DependsOnData, "layer2"),
        (TwoCross, "layer2"),
        (UsedTwice, "layer2"),
        (OwnTensor, "layer1"),
        (OwnTensor, "layer2"),
        (DependsOnMode, "layer1"),
        (DependsOnMode, "layer2"),
    ],
)
def test_others_are_run_whole(trunk, boundary):
    model = classifier(trunk())
    divided = divide(model, boundary, dtype=None)
    assert divided.frozen is None
    assert divided.trained is model


@pytest.mark.parametrize(
    ("trunk", "left"),
    [
        (DependsOnData, 3),
        (UsedTwice, 1),
        (AroundNorm, 1),
        (TwoCross, 0),
        (OwnTensor, 0),
        (DependsOnMode, 0),
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_below_the_head_every_network_is_cut(trunk, left, dtype):
    """And folded where a convolution's output goes into one BatchNorm and nowhere else."""
    model = classifier(trunk())
    divided = divide(model.train(), "head", dtype=dtype)
    model.eval()
    assert isinstance(divided.trained, Head)
    assert len(norms(divided.frozen)) == left
    for images in (pixels(), 255 - pixels()):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            features, expected = divided.frozen(images), model(images)
            found = divided.trained(features)
        assert not features.requires_grad
        assert_same(found, expected, tolerance=1e-5 if dtype is None else 0.05)


def test_the_cut_may_be_made_in_any_mode():
    model = classifier(Trunk())
    freeze_for(
        model, StageConfig(name="s", epochs=1, lr=0.1, trainable="layer2+", batchnorm="train")
    )
    modes = {name: m.training for name, m in model.named_modules()}
    divided = divide(model, "layer2", dtype=None)
    assert {name: m.training for name, m in model.named_modules()} == modes
    model.eval()
    assert_same(divided.trained(divided.frozen(pixels())), model(pixels()))
