"""Stages on a GPU: loss scaling, memory that really runs out, features, and no waiting."""

from pathlib import Path

import pytest
import torch
from tiny_runs import make_dataset, metric_rows, results, scale_loss, weights
from tiny_runs import train as train_alone

from rtl_dist.training.stage_trainer import StageTrainer

pytestmark = pytest.mark.gpu
ALL = {"name": "all", "steps": 8, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}


def train(*arguments, **changes):
    """With workers, whose ring is locked in memory and copied from beside the step."""
    return train_alone(*arguments, **({"data__workers": 2} | changes))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_cached_features_train_the_same_weights(tmp_path, dataset, precision):
    stage = {**ALL, "trainable": "layer2+", "steps": 16, "views": 1}
    cached, plain = (
        weights(train(tmp_path, dataset, cache, stages=[{**stage, "cache": cache}],
                      precision=precision, features={"cache_dir": str(tmp_path / "features")}))
        for cache in ("auto", "off")
    )  # fmt: skip
    for name, value in cached.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-2, atol=1e-3)


def test_an_overflow_of_the_loss_scale_is_a_skipped_step(tmp_path, dataset, monkeypatch):
    scale_loss(monkeypatch, lambda step, _: 1e30 if step == 3 else 1)
    run = train(tmp_path, dataset, stages=[ALL], precision="fp16")
    assert results(run)["skipped_steps"] >= 1
    assert all(value.isfinite().all() for value in weights(run).values())


def test_memory_that_runs_out_halves_the_microbatch(tmp_path, dataset, monkeypatch):
    learn_from, held = StageTrainer.learn_from, []

    def learn(self, batch, microbatch, per_rank, *, shares):
        if self._run.state.step == 3 and microbatch == 1 and not held:
            held.append(torch.cuda.get_device_properties(0).total_memory)
            torch.cuda.empty_cache()  # of what is kept for the next tensors, none would be refused
            torch.cuda.set_per_process_memory_fraction(1e-6)  # of which all is in use already
        try:
            return learn_from(self, batch, microbatch, per_rank, shares=shares)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(StageTrainer, "learn_from", learn)
    torch.cuda.empty_cache()
    run = train(tmp_path, dataset, stages=[ALL], data__image_size=224, precision="bf16")
    assert held
    halvings = results(run)["microbatch_halvings"]
    assert halvings == [{"from_step": 3, "micro": 2}]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_never_waits_for_the_device(tmp_path, dataset, monkeypatch, precision):
    step, checked = StageTrainer.step, []

    def watched(self, rate_factor=None):
        if self._run.state.step < 2:  # buckets, optimizer state and kernels are set up
            return step(self, rate_factor)
        checked.append(True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, rate_factor)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(StageTrainer, "step", watched)
    train(tmp_path, dataset, stages=[ALL], precision=precision, optim={"ema": 0.9})
    assert len(checked) == 6


def test_the_microbatch_is_found_by_trying(tmp_path, dataset):
    run = train(tmp_path, dataset, stages=[ALL], batch={"global": 16, "micro": "auto"})
    assert "micro: 16" in (run / "config.yaml").read_text()
    assert metric_rows(run)[-1]["step"] == 8
