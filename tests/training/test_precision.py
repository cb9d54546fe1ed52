"""Every stage multiplies in the run's precision, also one that trains what the stage before did."""

from pathlib import Path

import pytest
import torch
from faulty_run import inject
from fp16_on_cpu import allow_fp16
from tiny_runs import make_dataset, results, train

from rtl_dist.model.head import Head
from rtl_dist.training.stage_trainer import StageTrainer

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), val=3)


@pytest.fixture
def multiplied_in(monkeypatch) -> list[torch.dtype | None]:
    """Of each forward pass of training: autocast's type, None where there is no autocast."""
    seen: list[torch.dtype | None] = []
    forward = Head.forward

    def watched(self, features):
        if self.training and not features.is_meta:
            is_on = torch.is_autocast_enabled("cpu")
            seen.append(torch.get_autocast_dtype("cpu") if is_on else None)
        return forward(self, features)

    monkeypatch.setattr(Head, "forward", watched)
    return seen


@pytest.mark.parametrize(("trainable", "precision"), [("all", "bf16"), ("head", "fp16")])
def test_two_stages_that_train_the_same(
    tmp_path, dataset, monkeypatch, multiplied_in, trainable, precision
):
    allow_fp16(monkeypatch)
    stage = {"steps": 1, "trainable": trainable, "lr": 1e-2}
    stages = [{**stage, "name": "one", "steps": 2}, {**stage, "name": "two"}]
    train(tmp_path, dataset, stages=stages, precision=precision)
    assert multiplied_in == [DTYPES[precision]] * 12


def test_after_a_halving(tmp_path, dataset, monkeypatch, multiplied_in):
    monkeypatch.setattr(StageTrainer, "learn_from", StageTrainer.learn_from)
    inject("oom", 1, 0)
    stages = [{"name": "all", "steps": 3, "trainable": "all", "lr": 1e-2}]
    run = train(tmp_path, dataset, stages=stages, precision="bf16")
    assert results(run)["microbatch_halvings"]
    assert set(multiplied_in) == {torch.bfloat16}
