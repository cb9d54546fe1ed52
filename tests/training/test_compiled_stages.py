"""Stages that are compiled: in their first step, and nowhere else; what is kept is computed as it is
without."""

import functools
from pathlib import Path

import pytest
import torch
from tiny_runs import make_dataset, same, train, weights
from torch._dynamo.utils import counters

from rtl_dist.features import maker
from rtl_dist.training.stage_trainer import StageTrainer
from rtl_dist.training.step_boundary import StepBoundary

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
TOP = {"name": "top", "steps": 3, "trainable": ["layer3", "head"], "lr": 1e-2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def graphs(monkeypatch) -> list[tuple[str, int]]:
    """Compiles by a backend that changes nothing. What was done, and how many graphs were made in
    it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    seen: list[tuple[str, int]] = []

    def noting(name, function):
        def noted(*arguments, **options):
            before = counters["stats"]["unique_graphs"]
            result = function(*arguments, **options)
            seen.append((name, counters["stats"]["unique_graphs"] - before))
            return result

        return noted

    monkeypatch.setattr(StageTrainer, "step", noting("step", StageTrainer.step))
    monkeypatch.setattr(StepBoundary, "cross", noting("boundary", StepBoundary.cross))
    monkeypatch.setattr(maker, "compute_view", noting("features", maker.compute_view))
    return seen


def test_only_a_stage_s_first_step_compiles(tmp_path, dataset, graphs):
    changes = {
        "stages": [{**TOP, "batchnorm": "train"}, {**TOP, "name": "again", "steps": 2}],
        "eval": {"every": "1 step"},
        "optim": {"ema": 0.5},
    }
    compiled = train(tmp_path, dataset, "compiled", **changes, compile=True)
    made = [count for what, count in graphs if what == "step"]
    assert [count > 0 for count in made] == [True, False, False, True, False]
    assert {count for what, count in graphs if what != "step"} == {0}
    plain = train(tmp_path, dataset, "plain", **changes)
    for name, value in weights(compiled).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-4, atol=1e-5)


def test_features_are_the_same_with_and_without(tmp_path, dataset, graphs, computed):
    changes = {"stages": [{**TOP, "steps": 4, "views": 1}]}
    compiled = train(tmp_path, dataset, "compiled", **changes, compile=True)
    assert [count for what, count in graphs if what == "features"] == [0, 0]
    assert sum(count for what, count in graphs if what == "step") > 0
    plain = train(tmp_path, dataset, "plain", **changes)
    assert computed == ["train", "val"]  # the latter's are found
    assert same(weights(plain), weights(compiled))
