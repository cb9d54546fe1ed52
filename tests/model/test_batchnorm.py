"""Running statistics folded once a step, whatever the number of processes."""

import copy

import pytest
import torch
from torch import nn

from rtl_dist.model.batchnorm import StepStatistics

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    net[3].momentum = 0.3
    return net.double()


def microbatches(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 5, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double())


def buffers(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


def step_at(world: int, batches: list[torch.Tensor], steps: int) -> list[dict[str, torch.Tensor]]:
    """Runs ``world`` ranks in turn, sharing each step's microbatches; their buffers at the end."""
    ranks = [network() for _ in range(world)]
    statistics = [StepStatistics(net) for net in ranks]
    share = len(batches) // steps // world
    for step in range(steps):
        sums: list[torch.Tensor] = []
        for rank, net in enumerate(ranks):
            statistics[rank].begin()
            first = (step * world + rank) * share
            for batch in batches[first : first + share]:
                net(batch)
                statistics[rank].add()
            # one fold to learn this rank's mean, undone, as a collective would exchange it
            statistics[rank].fold(
                lambda mean, sums=sums: sums.append(mean.clone()) or mean, taken=TAKEN
            )
        mean = sum(sums) / world
        for rank in statistics:
            rank.fold(lambda _, mean=mean: mean, taken=TAKEN)
    return [buffers(net) for net in ranks]


def test_any_number_of_ranks_gives_the_same_statistics():
    batches = microbatches(12)
    alone = step_at(1, batches, 3)[0]
    for world in (2, 4):
        for rank in step_at(world, batches, 3):
            for name, value in rank.items():
                torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-12)


def test_the_statistics_are_those_of_the_microbatches_averaged():
    net, batches = network(), microbatches(4)
    before = buffers(net)
    outputs = [net[0](batch) for batch in batches]
    mean = torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0)
    variance = torch.stack([out.transpose(0, 1).flatten(1).var(1) for out in outputs]).mean(0)
    statistics = StepStatistics(net)
    statistics.begin()
    for batch in batches:
        net(batch)
        statistics.add()
    statistics.fold(lambda value: value, taken=TAKEN)
    after = buffers(net)
    torch.testing.assert_close(after["1.running_mean"], 0.9 * before["1.running_mean"] + 0.1 * mean)
    torch.testing.assert_close(
        after["1.running_var"], 0.9 * before["1.running_var"] + 0.1 * variance
    )
    assert after["1.num_batches_tracked"] == 1


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("factor", [1.0, float("inf")])
def test_a_step_that_is_not_taken_leaves_no_trace(factor):
    net, twin, batches = network(), network(), microbatches(3)
    skipping, plain = StepStatistics(net), StepStatistics(twin)
    for number, batch in enumerate(batches):
        before = buffers(net)
        skipping.begin()
        net(batch * (factor if number == 1 else 1.0))
        skipping.add()
        assert not same(before, buffers(net))
        skipping.fold(lambda value: value, taken=SKIPPED if number == 1 else TAKEN)
        assert same(before, buffers(net)) is (number == 1)
        if number != 1:
            plain.begin()
            twin(batch)
            plain.add()
            plain.fold(lambda value: value, taken=TAKEN)
    assert same(buffers(twin), buffers(net))  # what overflowed is not in a later step either


def test_a_step_is_put_back_as_if_it_had_not_begun():
    net = network()
    before = buffers(net)
    statistics = StepStatistics(net)
    statistics.begin()
    net(microbatches(1)[0] * float("inf"))
    assert not torch.isfinite(net[1].running_mean).all()
    statistics.put_back()
    assert same(before, buffers(net))
    net(microbatches(1)[0])
    statistics.add()
    statistics.fold(lambda value: value, taken=TAKEN)
    assert not same(before, buffers(net))
    statistics.put_back()
    assert same(before, buffers(net))


def test_statistics_can_be_taken_whole():
    net, batches = network(), microbatches(2)
    outputs = [net[0](batch) for batch in batches]
    statistics = StepStatistics(net, momentum=1.0)
    statistics.begin()
    for batch in batches:
        net(batch)
        statistics.add()
    statistics.fold(lambda value: value, taken=TAKEN)
    expected = torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0)
    torch.testing.assert_close(net[1].running_mean, expected)
    statistics.close()
    assert (net[1].momentum, net[3].momentum) == (0.1, 0.3)


def test_a_step_without_microbatches_is_no_division_by_zero():
    net = network()
    before = buffers(net)
    statistics = StepStatistics(net)
    statistics.begin()  # the loader failed before the first
    statistics.fold(lambda value: value, taken=SKIPPED)
    assert same(before, buffers(net))


def test_frozen_layers_are_left_alone_and_momenta_come_back():
    net = network()
    net[1].eval()
    before = buffers(net)
    statistics = StepStatistics(net)
    assert (net[1].momentum, net[3].momentum) == (0.1, 1.0)
    statistics.begin()
    net(microbatches(1)[0])
    statistics.add()
    statistics.fold(lambda value: value, taken=TAKEN)
    statistics.close()
    assert (net[1].momentum, net[3].momentum) == (0.1, 0.3)
    after = buffers(net)
    assert torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert not torch.equal(before["3.running_mean"], after["3.running_mean"])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_network_without_layers_in_training_costs_nothing(frozen):
    net = copy.deepcopy(network()).eval() if frozen else nn.Linear(3, 2)
    statistics = StepStatistics(net)
    statistics.begin()
    statistics.add()
    statistics.fold(lambda value: pytest.fail("nothing to exchange"), taken=TAKEN)
    statistics.put_back()


def test_a_layer_that_averages_over_all_time_does_so_again_afterwards():
    net = network()
    net[1].momentum = None
    statistics = StepStatistics(net)
    assert net[1].momentum == 1.0
    statistics.close()
    assert net[1].momentum is None
