"""The moving average of the weights."""

import pytest
import torch

from rtl_dist.config import Data, Model
from rtl_dist.ema import Average
from rtl_dist.model.build import make_classifier


def network():
    data = Data(path="x", image_size=32)
    return make_classifier(Model(name="basic_cnn", weights="none"), data, num_classes=3, seed=0)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_it_follows_weights_and_statistics_at_its_rate(decay):
    model = network()
    average = Average(model, decay)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.ones_like(value) * (step + 1))
        average.update(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_it_is_a_model_of_its_own():
    model = network()
    average = Average(model, 0.9)
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.head.weight.add_(1)
    assert not torch.equal(average.model.head.weight, model.head.weight)
