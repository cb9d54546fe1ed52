"""fp16: the scale of the loss is found anew by each stage, and what it costs says nothing more."""

import json
from pathlib import Path

import pytest
import torch
from fp16_on_cpu import allow_fp16, watch_scale
from tiny_runs import (
    killed_after,
    make_dataset,
    require_equal_runs,
    results,
    scale_loss,
    tiny_config,
    train,
    write_config,
)

from rtl_dist.cli import main
from rtl_dist.training import lr_finder
from rtl_dist.training.stage_optimizer import FIRST_SCALE, MOST_SCALE

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
ALL = {"name": "all", "trainable": "all", "lr": 1e-2}
HEAD = {"name": "head", "trainable": "head", "lr": 1e-2, "views": 1}
OVERFLOWS = 2.0**10  # times the loss: the first scale is too large, one of its halves is not


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), val=3)


def fp16(**stage_of: int) -> dict:
    stages = [{**{"head": HEAD, "all": ALL}[name], "steps": n} for name, n in stage_of.items()]
    return {"precision": "fp16", "stages": stages, "eval": {"every": "99 steps"}}


def test_a_stage_does_not_begin_with_the_scale_that_a_head_grew(tmp_path, dataset, monkeypatch):
    allow_fp16(monkeypatch, growth_interval=1)  # for 2,000, as steps of a head go by unnoticed
    seen = watch_scale(monkeypatch)
    scale_loss(monkeypatch, lambda step, _: 2.0**-16)  # so that nothing overflows
    train(tmp_path, dataset, **fp16(head=10, all=1))
    scales = [scale for _, scale in seen]
    assert scales[:10] == [min(FIRST_SCALE * 2**n, MOST_SCALE) for n in range(1, 11)]
    assert scales[10] == 2 * FIRST_SCALE


def test_a_stage_begins_with_the_scale_that_one_was_brought_down_to(tmp_path, dataset, monkeypatch):
    allow_fp16(monkeypatch)
    seen = watch_scale(monkeypatch)
    scale_loss(monkeypatch, lambda step, _: OVERFLOWS)
    stages = [{**HEAD, "steps": 12}, {**HEAD, "name": "again", "steps": 1}]
    train(tmp_path, dataset, **{**fp16(), "stages": stages})
    taken, scales = zip(*seen, strict=True)
    assert taken[0] is False
    assert taken[-2:] == (True, True)
    assert scales[-2] == scales[-1] < FIRST_SCALE


def test_a_resumed_run_has_the_scale_of_its_stage(tmp_path, dataset, monkeypatch):
    changes = {**fp16(head=2, all=6), "checkpoint": {"every": "3 steps"}}
    allow_fp16(monkeypatch, growth_interval=3)
    scale_loss(monkeypatch, lambda step, _: OVERFLOWS if step > 2 else 1)
    whole = train(tmp_path, dataset, "whole", **changes)
    assert results(whole)["skipped_steps"] > 0
    for step in (2, 7):
        with killed_after(step, monkeypatch):
            train(tmp_path, dataset, f"killed-{step}", **changes)
        require_equal_runs(whole, train(tmp_path, dataset, f"killed-{step}", **changes))


def test_stages_of_two_and_three_steps_may_skip_one(tmp_path, dataset, monkeypatch):
    allow_fp16(monkeypatch)
    scale_loss(monkeypatch, lambda step, _: torch.inf if step in (0, 3) else 1)
    run = train(tmp_path, dataset, **fp16(head=2, all=3))
    assert results(run)["skipped_steps"] == 2


def test_a_stage_that_took_no_step_ends_the_run(tmp_path, dataset, monkeypatch, capsys):
    allow_fp16(monkeypatch)
    scale_loss(monkeypatch, lambda step, _: torch.inf)
    train(tmp_path, dataset, code=1, **fp16(all=3))
    told = capsys.readouterr().err
    assert "3 steps in a row up to step 3 (stage all) were not taken" in told
    assert "give the stage more steps, in which fp16 finds the scale of the loss" in told


def test_what_the_stage_before_skipped_last_is_not_counted(tmp_path, dataset, monkeypatch):
    allow_fp16(monkeypatch)
    scale_loss(monkeypatch, lambda step, _: torch.inf if step in (3, 4) else 1)
    run = train(tmp_path, dataset, **fp16(head=4, all=2))
    assert results(run)["skipped_steps"] == 2


def range_test(tmp_path: Path, dataset: Path, **changes) -> dict:
    config = tiny_config(dataset, tmp_path / "run", **fp16(all=2), **changes)
    assert main(["find-lr", "--config", write_config(tmp_path / "tiny.yaml", config)]) == 0
    return json.loads((tmp_path / "run-find-lr" / "lr_finder" / "all.json").read_text())


def test_skipped_steps_do_not_end_a_range_test(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(lr_finder, "STEPS", 3)
    monkeypatch.setattr("rtl_dist.training.find_lr.draw_range_test", lambda test, folder: "")
    allow_fp16(monkeypatch)
    seen = watch_scale(monkeypatch)
    scale_loss(monkeypatch, lambda step, _: OVERFLOWS)
    found = range_test(tmp_path, dataset)
    taken = [taken for taken, _ in seen]
    assert taken[0] is False
    assert len(found["rates"]) == sum(taken) == 3
    assert found["rates"][0] == pytest.approx(1e-6)  # of which the first step was tried again


def test_a_range_test_of_which_no_step_is_taken_ends(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setattr(lr_finder, "STEPS", 4)
    allow_fp16(monkeypatch)
    seen = watch_scale(monkeypatch)
    # the loss is a number, its gradient never
    monkeypatch.setattr(lr_finder, "non_finite", lambda counts: 0)
    scale_loss(monkeypatch, lambda step, _: torch.inf)
    config = tiny_config(dataset, tmp_path / "run", optim={"skip_limit": 3}, **fp16(all=2))
    assert main(["find-lr", "--config", write_config(tmp_path / "tiny.yaml", config)]) == 1
    assert "the loss is a number at no learning rate" in capsys.readouterr().err
    assert len(seen) == 3


@pytest.mark.gpu
def test_on_a_gpu_too(tmp_path, dataset, monkeypatch):
    seen = watch_scale(monkeypatch)
    scale_loss(monkeypatch, lambda step, _: OVERFLOWS if step >= 4 else 1)
    run = train(tmp_path, dataset, **fp16(head=4, all=12))
    assert results(run)["status"] == "done"
    assert [taken for taken, _ in seen][-4:] == [True] * 4
    monkeypatch.setattr(lr_finder, "STEPS", 8)
    assert len(range_test(tmp_path, dataset)["rates"]) > 1
