"""Whether compiling pays: tried where it may, and never an end of the run."""

import logging
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rtl_dist.distributed.heartbeat import Heartbeat
from rtl_dist.model.freezing import digest
from rtl_dist.training import compilation
from rtl_dist.training.compilation import compiling_pays

MANY = 2 * 10**6  # images, more than the least
BATCH = 20


class Ranks:
    """A runtime of which this is rank 0."""

    def __init__(self, world_size=1, device="cuda"):
        self.world_size, self.device, self.is_main = world_size, torch.device(device), True
        self.heartbeat = Heartbeat()
        self.accelerator = SimpleNamespace(autocast=nullcontext)
        self.asked = 0

    def from_main(self, make):
        self.asked += 1
        return make()


class Compiled(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)


class Clock:
    """Tells what it is set to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(compilation, "time", clock)
    monkeypatch.setattr(torch, "compile", Compiled)
    return clock


@pytest.fixture
def passes_take(monkeypatch, clock):
    """Sets the seconds of a pass as it is and compiled, and those that compiling takes; returns
    what was timed."""

    def set_times(eager_s, compiled_s=0.0, cost_s=0.0):
        timed = []

        def time_passes(network, inputs, runtime):
            timed.append(type(network))
            if isinstance(network, Compiled):
                clock.now += cost_s
                return compiled_s
            return eager_s

        monkeypatch.setattr(compilation, "time_passes", time_passes)
        return timed

    return set_times


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def verdict(*, num_images=MANY, runtime=None, trained=None, make_inputs=None) -> bool:
    return compiling_pays(
        trained or network(),
        make_inputs or (lambda: torch.ones(BATCH, 3)),
        num_images=num_images,
        runtime=runtime or Ranks(),
        what="all",
    )


@pytest.mark.parametrize(
    ("device", "num_images"), [("cuda", 1_199_999), ("cpu", 10**9), ("mps", 10**9)]
)
def test_with_little_work_nothing_is_run(device, num_images):
    runtime = Ranks(device=device)
    assert not verdict(
        num_images=num_images,
        runtime=runtime,
        make_inputs=lambda: pytest.fail("no image is asked for"),
    )
    assert runtime.asked == 0


@pytest.mark.parametrize(
    ("compiled_s", "cost_s", "pays"),
    # of 100,000 passes, each of 0.1 s as it is
    [(0.09, 990, True), (0.09, 1010, False), (0.1, 0, False), (0.2, 0, False), (0.05, 4000, True)],
)
def test_it_pays_where_it_saves_more_than_it_costs(passes_take, compiled_s, cost_s, pays):
    timed = passes_take(0.1, compiled_s, cost_s)
    assert verdict() is pays
    assert timed == [nn.Sequential, Compiled]


def test_ranks_share_the_passes(passes_take):
    passes_take(0.1, 0.09, cost_s=600)
    assert verdict(runtime=Ranks(1))
    assert not verdict(runtime=Ranks(2))


@pytest.mark.parametrize(("eager_s", "is_tried"), [(0.0119, False), (0.0121, True)])
def test_it_is_tried_where_20_minutes_of_work_remain(passes_take, eager_s, is_tried):
    timed = passes_take(eager_s, eager_s / 2)
    assert verdict() is is_tried
    assert (Compiled in timed) is is_tried


def test_a_compiler_that_fails_leaves_the_network_as_it_is(passes_take, monkeypatch, caplog):
    passes_take(0.1)

    def fail(_):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compilation.LOG, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="rtl_dist"):
        assert not verdict()
    assert "all cannot be compiled" in caplog.text
    assert "no C++ compiler" in caplog.text


def test_the_verdict_is_rank_0_s(passes_take):
    passes_take(0.1, 0.2)

    class Other(Ranks):
        def from_main(self, make):
            return True

    assert verdict(runtime=Other(2), make_inputs=lambda: pytest.fail("this is not rank 0")) is True


def test_trying_leaves_the_network_as_it_was(monkeypatch):
    monkeypatch.setattr(compilation, "LEAST_S", 0.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "compile", Compiled)
    trained = network()
    before = digest(trained.state_dict())
    verdict(trained=trained)
    assert digest(trained.state_dict()) == before
    assert all(p.grad is None for p in trained.parameters())


def test_what_was_tried_is_gone_before_training_begins(passes_take, monkeypatch):
    passes_take(0.1, 0.05)
    time_passes, copies, alive = compilation.time_passes, [], []

    def noted(network, inputs, runtime):
        copies.extend(weakref.ref(p) for p in [*network.parameters(), inputs])
        return time_passes(network, inputs, runtime)

    monkeypatch.setattr(compilation, "time_passes", noted)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: alive.append(sum(ref() is not None for ref in copies))
    )
    assert verdict(make_inputs=lambda: torch.ones(BATCH, 3))
    assert len(copies) == 2 * 5
    assert alive == [0]


def test_a_pass_takes_as_long_as_the_fastest_after_the_first_two(clock):
    durations = iter([9.0, 0.5, 3.0, 2.0, 4.0])  # the first compiles, the second still warms up
    passed_back = []

    class Slow(nn.Linear):
        def forward(self, images):
            clock.now += next(durations)
            out = super().forward(images)
            out.register_hook(lambda gradient: passed_back.append(True))
            return out

    assert compilation.time_passes(Slow(3, 2), torch.ones(1, 3), Ranks(device="cpu")) == 2.0
    assert len(passed_back) == 5
