"""A head that is trained alone by steps: on standardised features, whose measures do not depend on
caches, kills or the number of processes."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from killed_runs import require_done, run_ranks
from safetensors.torch import load_file
from tiny_runs import (
    killed_after,
    make_dataset,
    metric_rows,
    newest_checkpoint,
    require_equal_runs,
    results,
    same,
    tiny_config,
    train,
    weights,
    weights_at,
    write_config,
)

from rtl_dist.core.errors import OutOfMemory
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.evaluation.logits import eval_transform
from rtl_dist.model.folder import load_model
from rtl_dist.model.head import Head
from rtl_dist.training.stage_network import StageNetwork
from rtl_dist.training.stage_trainer import StageTrainer

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
HEAD = {"name": "head", "trainable": "head", "lr": 1e-2}
ALL = {"name": "all", "trainable": "all", "lr": 1e-2, "batchnorm": "train"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def features_of(run: Path, dataset: Path, samples: list[int]) -> torch.Tensor:
    """float64 (n, F), of the images as evaluations see them."""
    model, split = load_model(run).model.eval(), open_dataset(dataset).split("train")
    transform = eval_transform(model)
    images = []
    for row in split.index[samples]:
        content = (dataset / split.shards[row["shard"]].path).read_bytes()
        start = int(row["offset"])
        images.append(transform(content[start : start + int(row["size"])], 0))
    with torch.no_grad():
        return model.features(torch.stack(images)).double()


@pytest.mark.parametrize("views", [None, 1])
def test_they_are_measured_on_the_stage_s_first_images(tmp_path, dataset, views):
    """Images that are not varied, so that they can be computed here."""
    still = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "hflip": 0.0}
    stages = [{**ALL, "steps": 1}, {**HEAD, "steps": 2, "views": views}]
    run = train(tmp_path, dataset, stages=stages, run__ledger=True, augment=still)
    lines = [json.loads(line) for line in (run / "ledger/samples.jsonl").read_text().splitlines()]
    samples = [n for line in lines if line["step"] >= 1 for n in line["samples"]]
    assert len(samples) == 32
    seen = features_of(run, dataset, samples)
    found = weights(run)
    torch.testing.assert_close(found["head.mean"].double(), seen.mean(0), rtol=1e-4, atol=1e-4)
    scale = seen.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(found["head.scale"].double(), scale, rtol=1e-3, atol=0)


def test_only_a_head_alone_is_given_them_and_the_next_stage_finds_it_plain(tmp_path, dataset):
    stages = [{**HEAD, "steps": 2}, {**ALL, "steps": 2}]
    run = train(tmp_path, dataset, stages=stages, checkpoint={"every": "1 step", "keep": 9})
    has_mean = ["head.mean" in weights_at(run, step) for step in (1, 2, 3, 4)]
    assert has_mean == [True, True, False, False]


def test_cached_and_computed_features_have_the_same(tmp_path, dataset):
    stages = [{**HEAD, "epochs": 4, "views": 2}]
    none = {"cache_dir": str(tmp_path / "features"), "cache_gb": 1e-6}
    one = train(tmp_path, dataset, "one", stages=stages)
    two = train(tmp_path, dataset, "two", stages=stages, features=none)
    assert "head.mean" in weights(one)
    assert same(weights(one), weights(two))


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_goes_on_from_the_middle_of_the_stage(tmp_path, dataset, monkeypatch, step):
    changes = {"stages": [{**HEAD, "steps": 6}, {**ALL, "steps": 1}], "optim": {"ema": 0.9}}
    changes["checkpoint"] = {"every": "1 step"}
    whole = train(tmp_path, dataset, "whole", **changes)
    with killed_after(step, monkeypatch):
        train(tmp_path, dataset, "killed", **changes)
    require_equal_runs(whole, train(tmp_path, dataset, "killed", **changes))


def test_a_run_goes_on_that_was_stopped_in_its_first_step(tmp_path, dataset, monkeypatch):
    changes = {"stages": [{**ALL, "steps": 1}, {**HEAD, "steps": 3}], "optim": {"ema": 0.9}}
    whole = train(tmp_path, dataset, "whole", **changes)
    learn = StageTrainer.learn_from

    def learn_and_stop(self, *arguments, **named):
        if self._run.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "learn_from", learn_and_stop)
        stopped = train(tmp_path, dataset, "stopped", code=75, **changes)
    assert newest_checkpoint(stopped).name == "step-00000001"
    require_equal_runs(whole, train(tmp_path, dataset, "stopped", **changes))


def test_they_are_measured_once_where_memory_is_short(tmp_path, dataset, monkeypatch):
    measured, short, learn = [], [True], StageTrainer.learn_from

    def learn_or_not(self, *arguments, **named):
        if short:
            return OutOfMemory(f"out of memory {short.pop()}")
        return learn(self, *arguments, **named)

    monkeypatch.setattr(StageTrainer, "learn_from", learn_or_not)
    monkeypatch.setattr(Head, "standardize", lambda *given, _old=Head.standardize: (
        measured.append(given) or _old(*given)))  # fmt: skip
    run = train(tmp_path, dataset, stages=[{**HEAD, "steps": 2}])
    assert len(measured) == 1
    assert "head.mean" in weights(run)


def test_memory_that_is_short_while_they_are_measured_halves_the_microbatch(
    tmp_path, dataset, monkeypatch
):
    short, inputs_of = [True], StageNetwork.inputs_of

    def inputs_or_not(self, batch):
        if short:
            short.pop()
            raise torch.OutOfMemoryError
        return inputs_of(self, batch)

    monkeypatch.setattr(StageNetwork, "inputs_of", inputs_or_not)
    run = train(tmp_path, dataset, stages=[{**HEAD, "steps": 2}])
    assert not short
    assert "head.mean" in weights(run)
    state = json.loads((newest_checkpoint(run) / "state.json").read_text())["state"]
    assert [step for step, _ in state["halvings"]] == [0]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_best_is_plain_and_as_good_as_the_run_says(tmp_path, dataset, ema):
    run = train(
        tmp_path,
        dataset,
        stages=[{**HEAD, "steps": 4}],
        eval={"every": "1 step"},
        optim={"ema": ema},
        data__test="val",
    )
    best = load_file(run / "best" / "model.safetensors")
    assert not [name for name in best if name.endswith((".scale", "head.mean"))]
    found = results(run)
    (row,) = [row for row in metric_rows(run) if row["step"] == found["best"]["step"]
              and "val/loss" in row]  # fmt: skip
    assert found["test"]["loss_raw"] == row["val/loss"]  # rows are of scores as they are
    assert found["test"]["top1"] == row["val/top1"]


def test_a_run_from_weights_of_the_middle_of_the_stage_keeps_the_head(tmp_path, dataset):
    stages = [{**HEAD, "steps": 4}]
    one = train(tmp_path, dataset, "one", stages=stages)
    model = {"name": "basic_cnn", "weights": str(newest_checkpoint(one)), "head": "keep"}
    still = [{**HEAD, "steps": 1, "lr": 1e-12}]
    two = train(tmp_path, dataset, "two", stages=still, model=model)
    last, first = metric_rows(one)[-1], metric_rows(two)[-1]
    assert first["val/loss"] == pytest.approx(last["val/loss"], rel=1e-5)


@pytest.mark.launch
def test_two_processes_measure_and_learn_what_one_does(tmp_path, dataset):
    stages = [{**HEAD, "steps": 4, "views": 1}, {**ALL, "steps": 1}]
    for world_size in (1, 2):
        run = tmp_path / str(world_size)
        changes = {"stages": stages, "precision": "fp64", "optim": {"ema": 0.9}}
        changes["features"] = {"cache_dir": str(tmp_path / f"features-{world_size}")}
        config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, **changes))
        require_done(run_ranks(config, "checkpoint.keep=9", world_size=world_size))
    for step in (4, 5):
        one, two = (weights_at(tmp_path / name, step) for name in "12")
        assert one.keys() == two.keys()
        assert ("head.mean" in one) == (step == 4)
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-9)
