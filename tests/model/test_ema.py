"""The moving average of the weights, and the BatchNorm statistics that it meets."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from rtl_dist.config import DataConfig, ModelConfig, StageConfig
from rtl_dist.core.errors import DataError
from rtl_dist.distributed.heartbeat import Heartbeat
from rtl_dist.distributed.ranks import Ranks
from rtl_dist.model.average import Average
from rtl_dist.model.batchnorm import learning_layers
from rtl_dist.model.build import make_classifier
from rtl_dist.model.freezing import digest, freeze_for

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


class Alone:
    """A runtime of one process."""

    def __init__(self):
        self.device, self.accelerator = torch.device("cpu"), self

    def autocast(self):
        return nullcontext()

    def mean_over_ranks(self, values):
        return values

    heartbeat = Heartbeat()
    in_rounds = Ranks.in_rounds

    def agree(self, *, bad_samples, failure):
        if failure is not None:
            raise failure
        return False, bad_samples


def network():
    data = DataConfig(path="x", image_size=32)
    return make_classifier(
        ModelConfig(name="basic_cnn", weights="none"), data, num_classes=3, seed=0
    )


def drift(model, seed):
    """Moves all weights and statistics somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator))
            else:
                value.add_(1)


def bits(model) -> str:
    return digest(model.state_dict())


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_it_follows_weights_and_statistics_at_its_rate(decay):
    model = network()
    average = Average(model, decay)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(3):
        drift(model, step)
        average.update(model, taken=TAKEN)
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


@pytest.mark.parametrize("junk", [0.5, torch.inf, torch.nan])
def test_a_step_that_is_not_taken_leaves_no_trace(junk):
    model = network()
    average = Average(model, 0.9)
    average.model.head.bias[0] = -0.0
    before = bits(average.model)
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(junk if value.is_floating_point() else 1)
    average.update(model, taken=SKIPPED)
    assert bits(average.model) == before
    model.load_state_dict(good)
    drift(model, 0)
    average.update(model, taken=TAKEN)
    assert bits(average.model) != before
    assert all(value.isfinite().all() for value in average.model.state_dict().values())


# --- statistics measured with the averaged weights -------------------------------------------


def images(count):
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(0, 256, (4, 3, 32, 32), generator=generator).to(torch.uint8)
            for _ in range(count)]  # fmt: skip


def norms_of(model) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def averaged() -> Average:
    """Of a network that has moved away from it."""
    model = network()
    average = Average(model, 0.5)
    drift(model, 1)
    average.update(model, taken=TAKEN)
    return average


def mean_of_batches(model, batches, layers) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(mean, unbiased variance) of what goes into each layer named, averaged over batches."""
    twin = copy.deepcopy(model).eval()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, norm in norms_of(twin).items():
        if name in layers:
            norm.train()
            norm.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return {
        name: (
            torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0),
            torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0),
        )
        for name, inputs in seen.items()
    }


@pytest.mark.parametrize("lowest", [0, 1])
def test_within_the_block_statistics_are_those_of_the_batches(lowest):
    average, batches = averaged(), images(3)
    before, momenta = bits(average.model), [m.momentum for m in norms_of(average.model).values()]
    weights = digest(dict(average.model.named_parameters()))
    untouched = {n: m.running_mean.clone() for n, m in norms_of(average.model).items()}
    layers = set(list(untouched)[lowest:])
    expected = mean_of_batches(average.model, batches, layers)
    assert len(expected) == 3 - lowest
    with average.with_statistics_of(iter(batches), len(batches), layers, Alone()):
        for name, norm in norms_of(average.model).items():
            if name in layers:
                torch.testing.assert_close(norm.running_mean, expected[name][0])
                torch.testing.assert_close(norm.running_var, expected[name][1])
                assert not torch.equal(norm.running_mean, untouched[name])
            else:
                assert torch.equal(norm.running_mean, untouched[name])
        assert digest(dict(average.model.named_parameters())) == weights
        assert not any(module.training for module in average.model.modules())
    assert bits(average.model) == before
    assert [m.momentum for m in norms_of(average.model).values()] == momenta
    assert not any(module.training for module in average.model.modules())


def test_ranks_share_what_they_measure():
    """Two ranks with other halves of the batches, in turn: what one would send is noted first."""
    batches, layers = images(4), set(norms_of(network()))
    sent: list[torch.Tensor] = []

    class Noting(Alone):
        def mean_over_ranks(self, values):
            sent.append(values.clone())
            return values

    for half in (batches[:2], batches[2:]):
        with averaged().with_statistics_of(half, 2, layers, Noting()):
            pass
    both = (sent[0] + sent[1]) / 2

    class Meeting(Alone):
        def mean_over_ranks(self, values):
            return both.clone()

    average = averaged()
    expected = mean_of_batches(average.model, batches, layers)
    with average.with_statistics_of(batches[:2], 2, layers, Meeting()):
        for name, norm in norms_of(average.model).items():
            torch.testing.assert_close(norm.running_mean, expected[name][0])


@pytest.mark.parametrize("where", ["in the loader", "within the block"])
def test_it_is_as_before_after_an_error_too(where):
    average, layers = averaged(), set(norms_of(network()))
    before = bits(average.model)
    entered, rounds = [], 2 if where == "in the loader" else 1

    def batches():
        yield images(1)[0]
        if where == "in the loader":
            raise DataError("a damaged sample")

    def evaluate():
        with average.with_statistics_of(batches(), rounds, layers, Alone()):
            entered.append(bits(average.model))
            raise DataError("while evaluating")

    with pytest.raises(DataError, match="a damaged" if where == "in the loader" else "while"):
        evaluate()
    assert (entered == []) is (where == "in the loader")
    assert before not in entered
    assert bits(average.model) == before
    assert not any(module.training for module in average.model.modules())


def test_which_statistics_follow_the_data():
    model = network()
    names = list(norms_of(model))
    top = {"name": "top", "epochs": 1, "lr": 0.1, "trainable": ["layer3", "head"]}
    for policy, expected in (("frozen", set()), ("stats", {names[2]}), ("train", {names[2]})):
        freeze_for(model, StageConfig(**top, batchnorm=policy))
        assert set(learning_layers(model)) == expected
    freeze_for(model, StageConfig(name="all", epochs=1, lr=0.1, batchnorm="train"))
    assert set(learning_layers(model)) == set(names)
    assert set(learning_layers(nn.BatchNorm2d(3, track_running_stats=False))) == set()
