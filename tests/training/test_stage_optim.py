"""What a stage's own optimizer does in a run, and rates that fall by steps or on a plateau."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    Killed,
    killed_after,
    make_dataset,
    metric_rows,
    require_equal_runs,
    results,
    same,
    scale_loss,
    train,
    weights,
)

from rtl_dist.training.stage_evaluator import StageEvaluator
from rtl_dist.training.stage_optimizer import StageOptimizer

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
ALL = {"name": "all", "trainable": "all", "lr": 1e-2, "batchnorm": "train"}
HEAD = {"name": "head", "trainable": "head", "lr": 1e-2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


# --- each stage's own ---

SGD = {"name": "sgd", "weight_decay": 0, "momentum": 0.8, "clip_grad_norm": None}


def test_a_head_by_sgd_and_the_whole_by_adamw_in_one_run(tmp_path, dataset, monkeypatch):
    built = []
    make = StageOptimizer.__init__

    def make_and_note(self, *arguments, **options):
        make(self, *arguments, **options)
        built.append(self._optimizer)

    monkeypatch.setattr(StageOptimizer, "__init__", make_and_note)
    stages = [{**HEAD, "steps": 4, "optim": SGD}, {**ALL, "steps": 4}]
    changes = {"checkpoint": {"every": "1 step", "keep": 9}, "optim": {"weight_decay": 0.3}}
    run = train(tmp_path, dataset, stages=stages, **changes)
    head, whole = built
    assert (type(head), type(whole)) == (torch.optim.SGD, torch.optim.AdamW)
    assert {group["weight_decay"] for group in head.param_groups} == {0}
    assert {group["momentum"] for group in head.param_groups} == {0.8}
    assert {group["weight_decay"] for group in whole.param_groups} == {0, 0.3}
    for step, states in ((4, {"momentum_buffer"}), (8, {"exp_avg", "exp_avg_sq", "step"})):
        kept = load_file(run / f"checkpoints/step-{step:08d}/optimizer.safetensors")
        assert {name.split("/")[0] for name in kept} == states

    # the first stage is that of a run that has nothing else
    alone = train(tmp_path, dataset, "alone", stages=[{**HEAD, "steps": 4}], optim=SGD)
    after_head = load_file(run / "checkpoints/step-00000004/model.safetensors")
    assert same(after_head, weights(alone))


def test_every_key_of_a_stage_s_section_counts(tmp_path, dataset, monkeypatch, capsys):
    """Compared with a run that has it for all: the first of two stages ends with equal weights."""
    kinds = {
        "smoothing": {"label_smoothing": 0.4},
        "clip": {"clip_grad_norm": 0.01},
        "betas": {"betas": [0.5, 0.5]},
        "loss": {"loss": "focal", "focal_gamma": 1.0},
        "rate": {"schedule": "linear", "warmup": 2},
        "adjustment": {"logit_adjustment": 2.0, "class_weights": "none"},
    }
    whole = {**ALL, "steps": 3}
    plain = weights(train(tmp_path, dataset, "plain", stages=[whole]))
    for name, keys in kinds.items():
        own = train(tmp_path, dataset, f"{name}-own", stages=[{**whole, "optim": keys}])
        of_all = train(tmp_path, dataset, f"{name}-all", stages=[whole], optim=keys)
        assert same(weights(own), weights(of_all)), name
        if name != "adjustment":  # classes of equal size
            assert not same(weights(own), plain), name


def test_the_limit_of_skipped_steps_is_the_stage_s(tmp_path, dataset, monkeypatch, capsys):
    scale_loss(monkeypatch, lambda step, n: torch.nan if step >= 3 and n == 0 else 1)
    stages = [{**ALL, "steps": 20, "optim": {"skip_limit": 2}}]
    train(tmp_path, dataset, code=1, stages=stages)
    assert "2 steps in a row up to step 5 (stage all)" in capsys.readouterr().err


def test_a_resumed_run_has_each_stage_s_optimizer(tmp_path, dataset, monkeypatch):
    changes = {
        "stages": [{**HEAD, "steps": 6, "optim": SGD}, {**ALL, "steps": 6}],
        "checkpoint": {"every": "2 steps"},
        "optim": {"ema": 0.9},
    }
    whole = train(tmp_path, dataset, "whole", **changes)
    for step in (3, 9):
        with killed_after(step, monkeypatch):
            train(tmp_path, dataset, f"killed-{step}", **changes)
        require_equal_runs(whole, train(tmp_path, dataset, f"killed-{step}", **changes))


def test_another_optimizer_of_a_stage_is_another_run(tmp_path, dataset, capsys):
    stage = {**HEAD, "steps": 2}
    train(tmp_path, dataset, stages=[{**stage, "optim": SGD}])
    train(tmp_path, dataset, code=2, stages=[{**stage, "optim": {**SGD, "momentum": 0.7}}])
    assert "stages.0.optim.momentum was 0.8 and is 0.7" in capsys.readouterr().err


def test_multi_label_keys_of_a_stage_are_refused_by_its_path(
    tmp_path, dataset, monkeypatch, capsys
):
    import rtl_dist.training.resolve as room
    from rtl_dist.core.tasks import SINGLE_LABEL

    monkeypatch.setattr(room, "MULTI_LABEL", SINGLE_LABEL)  # as if this data set were one
    stages = [{**HEAD, "steps": 2, "optim": {"loss": "cross_entropy"}}]
    train(tmp_path, dataset, code=2, stages=stages)
    assert "stages.0.optim.loss: cross_entropy needs single-label data" in capsys.readouterr().err


# --- rates that fall ---

PLATEAU = {"schedule": "plateau", "patience": 1, "factor": 0.5, "min_lr": 2e-3, "warmup": 2}
FALLING = {
    "stages": [
        {**ALL, "name": "one", "steps": 24, "optim": PLATEAU},
        {**HEAD, "name": "two", "steps": 12, "optim": {**PLATEAU, "min_lr": 0, "warmup": 0}},
    ],
    "eval": {"every": "2 steps"},
    "checkpoint": {"every": "3 steps", "keep": 99},
    "early_stop": {"metric": "val/top1"},
}


@pytest.fixture(scope="module")
def falling(dataset, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("falling"), dataset, **FALLING)


def theirs_of(rows: list[dict], *, base: float, min_lr: float, warmup: int) -> list[float]:
    """The rate of the step before each row of a stage, by torch's schedule fed with its figures."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=1, threshold=0, min_lr=min_lr, eps=0
    )
    rates, first = [], rows[0]["step"]
    for row in rows:
        rates.append(optimizer.param_groups[0]["lr"])
        if "val/top1" in row:
            done = row["step"] - first + 2
            schedule.step(row["val/top1"]) if done > warmup else None
            if done <= warmup:
                schedule.best = max(schedule.best, row["val/top1"])
    return rates


def test_a_plateau_is_torch_s_by_the_stage_s_own_metric(falling):
    rows = metric_rows(falling)
    for name, min_lr, warmup in (("one", 2e-3, 2), ("two", 0.0, 0)):
        of_stage = [row for row in rows if row["stage"] == name and "val/top1" in row]
        found = [row["lr/head"] for row in of_stage]
        assert found == pytest.approx(
            theirs_of(of_stage, base=1e-2, min_lr=min_lr, warmup=warmup), rel=1e-12
        )
        assert found[0] == 1e-2  # each stage begins anew
        assert found[-1] < 4e-3
    assert min(row["lr/head"] for row in rows if row["stage"] == "one") >= 2e-3


def falls_of(run: Path) -> list[int]:
    """The steps at which an evaluation had the rate fall."""
    rows = [row for row in metric_rows(run) if row["stage"] == "one"]
    pairs = itertools.pairwise(rows)
    return [one["step"] for one, other in pairs if one["lr/head"] > other["lr/head"]]


def test_killed_around_a_fall_it_goes_on_to_the_same_bytes(tmp_path, dataset, falling, monkeypatch):
    fall = falls_of(falling)[0]
    for step in (fall - 1, fall, fall + 1, fall + 3):
        name = f"killed-{step}"
        with killed_after(step, monkeypatch):
            train(tmp_path, dataset, name, **FALLING)
        run = train(tmp_path, dataset, name, **FALLING)
        require_equal_runs(falling, run)


def test_killed_between_saving_and_the_evaluation_that_has_it_fall(
    tmp_path, dataset, falling, monkeypatch
):
    fall, evaluate = falls_of(falling)[0], StageEvaluator.metrics

    def die(self, model):
        if self._run.state.step == fall:
            raise Killed
        return evaluate(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(StageEvaluator, "metrics", die)
        with pytest.raises(Killed):
            train(tmp_path, dataset, **FALLING)
    require_equal_runs(falling, train(tmp_path, dataset, **FALLING))


def test_steps_fall_where_the_rows_say(tmp_path, dataset):
    """57 images in batches of 16: an epoch is 3.56 steps."""
    optim = {"schedule": "step", "step_size": 1, "gamma": 0.5, "warmup": 0}
    changes = {"stages": [{**HEAD, "steps": 12, "optim": optim}], "eval": {"every": "99 steps"}}
    run = train(tmp_path, dataset, run__log_every="5 steps", **changes)
    found = [(row["step"], row["lr/head"]) for row in metric_rows(run)]
    # rows at 5 and 10, at the end, and just before each fall, at steps 4, 8 and 11
    rates = [(4, 1e-2), (5, 5e-3), (8, 5e-3), (10, 2.5e-3), (11, 2.5e-3), (12, 1.25e-3)]
    assert found == rates
    assert results(run)["steps"] == 12
