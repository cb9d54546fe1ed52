"""The head that may see standardised features: whatever is done to it, its scores stay the same."""

import copy

import pytest
import torch
from networks import CLASSES, classifier, pixels
from torch import nn

from rtl_dist.core.files import save_tensors
from rtl_dist.model.average import Average
from rtl_dist.model.head import Head, folded_state
from rtl_dist.model.weights import load_weights

MEAN, SCALE = torch.linspace(0.3, 2.0, 7, dtype=torch.float64), torch.tensor(0.2).double()


def features(count=50, *, seed=0):
    """As a ReLU leaves them: the mean several times the spread."""
    generator = torch.Generator().manual_seed(seed)
    return MEAN + SCALE * torch.randn(count, 7, generator=generator, dtype=torch.float64)


@pytest.fixture
def head():
    torch.manual_seed(1)
    return Head(7, 3).double()


def plain(head):
    """A linear layer with the scores that the head has in evaluation."""
    layer = nn.Linear(7, 3).double()
    layer.load_state_dict(head.plain_state())
    return layer


def test_it_begins_as_a_linear_layer(head):
    assert head.state_dict().keys() == {"weight", "bias"}
    layer = nn.Linear(7, 3).double()
    layer.load_state_dict(head.state_dict())
    for mode in (True, False):
        assert torch.equal(head.train(mode)(features()), layer(features()))


def test_standardising_taking_and_folding_keep_the_scores(head):
    seen = features()
    before = head(seen)
    head.standardize(MEAN, SCALE)
    for mode in (True, False):
        torch.testing.assert_close(head.train(mode)(seen), before, rtol=0, atol=1e-12)
    head.standardize(MEAN * 2, SCALE / 3)  # of another stage
    torch.testing.assert_close(head(seen), before, rtol=0, atol=1e-12)
    torch.testing.assert_close(head.train()(seen), before, rtol=0, atol=1e-12)
    head.fold()
    assert head.state_dict().keys() == {"weight", "bias"}
    torch.testing.assert_close(head(seen), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("standardised", [False, True])
def test_it_takes_the_scores_of_another_layer(head, standardised):
    other = nn.Linear(7, 3).double()
    if standardised:
        head.standardize(MEAN, SCALE)
    head.take(other.weight, other.bias)
    assert ("mean" in head.state_dict()) == standardised
    for mode in (True, False):
        scores = head.train(mode)(features())
        torch.testing.assert_close(scores, other(features()), rtol=0, atol=1e-12)


def test_its_weights_are_searched_among_standardised_features(head):
    """The gradient in training is that of a linear layer behind a standardisation."""
    head.standardize(MEAN, SCALE)
    seen = features()
    head(seen).square().sum().backward()
    layer = nn.Linear(7, 3).double()
    layer.load_state_dict({"weight": head.weight.detach(), "bias": head.bias.detach()})
    layer((seen - MEAN) / SCALE).square().sum().backward()
    torch.testing.assert_close(head.weight.grad, layer.weight.grad)
    torch.testing.assert_close(head.bias.grad, layer.bias.grad)


def test_dropout_acts_on_standardised_features(head):
    head.standardize(MEAN, SCALE)
    head.dropout.p = 0.5
    with torch.no_grad():
        head.weight.copy_(torch.eye(7, dtype=torch.float64)[:3])
        head.bias.zero_()
    seen = features()
    scores, wanted = head.train()(seen), ((seen - MEAN) / SCALE)[:, :3]
    dropped = scores == 0
    assert 0.3 < dropped.double().mean() < 0.7
    torch.testing.assert_close(scores[~dropped], 2 * wanted[~dropped])
    assert torch.equal(head.eval()(seen), plain(head)(seen))


def test_evaluation_is_what_the_plain_layer_will_say_to_the_bit():
    torch.manual_seed(1)
    head = Head(7, 3)
    head.standardize(MEAN, SCALE)
    seen = features().float()
    layer = nn.Linear(7, 3)
    layer.load_state_dict(head.plain_state())
    assert torch.equal(head.eval()(seen), layer(seen))
    head.fold()
    assert torch.equal(head(seen), layer(seen))


def test_folding_loses_no_more_than_one_rounding():
    """In float32 the bias and what the mean makes of the weights would nearly cancel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 512, generator=generator, dtype=torch.float64)
    mean = torch.rand(512, generator=generator, dtype=torch.float64) + 5
    head = Head(512, 3)
    head.take(weight, torch.zeros(3))
    head.standardize(mean, torch.tensor(0.1))
    stored = {name: value.double() for name, value in head.state_dict().items()}
    exact = stored["bias"] - stored["weight"] / stored["scale"] @ stored["mean"]
    head.fold()
    assert torch.equal(head.bias.detach(), exact.float())


@pytest.mark.parametrize("saved_standardised", [False, True])
@pytest.mark.parametrize("loads_standardised", [False, True])
def test_its_state_says_whether_it_standardises(head, saved_standardised, loads_standardised):
    other = Head(7, 3).double()
    if saved_standardised:
        head.standardize(MEAN, SCALE)
    if loads_standardised:
        other.standardize(MEAN + 1, SCALE + 1)
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    assert other.state_dict().keys() == head.state_dict().keys()
    for mode in (True, False):
        assert torch.equal(other.train(mode)(features()), head.train(mode)(features()))
    assert torch.equal(folded_state(head.state_dict())["bias"], other.plain_state()["bias"])


def test_a_checkpoint_from_before_heads_standardised_loads(head):
    model = classifier(dropout=0.1)
    old = {name: value for name, value in model.state_dict().items() if name != "head.bias"}
    old |= {"head.bias": torch.tensor([1.0, 2.0, 3.0])}
    assert not {"head.mean", "head.scale"} & old.keys()
    model.head.standardize(torch.ones(model.head.in_features), SCALE)
    model.load_state_dict(old)
    assert torch.equal(model.head.bias, old["head.bias"])
    assert model.head.mean is None


def standardised_classifier(seed):
    model = classifier(seed=seed).eval()
    model.head.standardize(torch.rand(model.head.in_features) + 1, torch.tensor(0.3))
    return model


def test_weights_from_the_middle_of_a_head_stage_keep_the_head(tmp_path):
    model = standardised_classifier(seed=1)
    save_tensors(model.state_dict(), tmp_path / "model.safetensors")
    other = classifier(seed=2).eval()
    file = str(tmp_path / "model.safetensors")
    assert "and head" in load_weights(other, file, head="keep", classes=CLASSES)
    assert other.head.mean is None
    assert torch.equal(other(pixels()), model(pixels()))


def test_an_exported_model_is_plain():
    model = standardised_classifier(seed=1)
    state = model.native_state_dict()
    assert not [name for name in state if name.endswith(("mean", "scale")) and "bn" not in name
                and "running" not in name]  # fmt: skip
    model.head.fold()
    folded = model.native_state_dict()
    assert state.keys() == folded.keys()
    assert all(torch.equal(state[name], folded[name]) for name in state)


def test_the_average_standardises_as_the_model_does():
    """What is averaged are weights of the same features: the average of plain heads is the same."""
    model = classifier(name="basic_cnn")
    average, both = Average(model, 0.9), copy.deepcopy(model)
    plain_average = Average(both, 0.9)
    mean = torch.rand(model.head.in_features)
    for each in (model, average.model):
        each.head.standardize(mean, torch.tensor(0.5))
    for number in range(5):
        weight, bias = torch.randn_like(model.head.weight), torch.full((3,), float(number))
        model.head.take(weight, bias)
        both.head.take(weight, bias)
        average.update(model, taken=torch.tensor(True))
        plain_average.update(both, taken=torch.tensor(True))
    assert torch.equal(average.model.head.mean, model.head.mean)
    assert torch.equal(average.model.head.scale, model.head.scale)
    found, wanted = average.model.head.plain_state(), plain_average.model.head.plain_state()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
