"""What a training step asks of the device beyond a bare loop's, counted: the count is the same
anywhere, and what a GPU that waits for the host is slowed down by."""

import importlib

import pytest
import torch
from tiny_runs import ROOT

MOST = 1.15  # times what the bare loop asks for


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmarks by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_operations_are_counted_as_a_gpu_is_asked_for_them(module):
    count = module("device_operations").count_operations
    values = [torch.ones(3, 2) for _ in range(200)]
    weight = torch.ones(2, requires_grad=True)

    def call():
        rows = values[0].t()[1:].reshape(-1).view(3, 1)  # a copy, since it is not laid out so
        torch._foreach_add_(values, values)  # 64 pairs a kernel
        (rows.expand(3, 2) * weight).sum().backward()

    asked = count(call)
    assert asked["_foreach_add_"] == 4
    assert asked["mul"] == 2, "the backward pass counts"
    assert not {"t", "view", "expand", "slice", "detach"} & (+asked).keys()


@pytest.mark.parametrize("ema", [0.0, 0.999])
def test_a_step_asks_for_little_more_than_a_bare_loop(module, ema):
    operations, sides = module("step_operations"), module("step_sides")
    task = operations.make_task("resnet50", batch=2, size=32, batchnorm="train", ema=ema)
    mine, theirs = (operations.counts_of(side, task) for side in (sides.ours, sides.bare))
    assert theirs["convolution"] == 53
    more = (mine - theirs).most_common(12)
    assert mine.total() <= MOST * theirs.total(), f"ours has more of {more}"
