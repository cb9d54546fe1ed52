"""Steps that are not taken, memory that does not suffice, and stops and ends in mid-stage."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_run import inject
from safetensors.torch import load_file
from tiny_runs import (
    killed_after,
    make_dataset,
    metric_rows,
    newest_checkpoint,
    results,
    same,
    scale_loss,
    train,
    weights,
)

from rtl_dist.training.stage_optimizer import StageOptimizer
from rtl_dist.training.stage_trainer import StageTrainer

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
ALL = {"name": "all", "trainable": "all", "lr": 1e-2, "batchnorm": "train"}
HEAD = {"name": "head", "trainable": "head", "lr": 1e-2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fault(monkeypatch) -> Iterator[None]:
    """Lets ``inject`` change the trainer for one test."""
    monkeypatch.setattr(StageTrainer, "learn_from", StageTrainer.learn_from)
    return inject


def test_a_step_without_a_finite_gradient_leaves_no_trace(tmp_path, dataset, fault, capsys):
    stages = [{**ALL, "steps": 6}]
    changes = {
        "stages": stages,
        "optim": {"ema": 0.9},
        "checkpoint": {"every": "1 step", "keep": 9},
    }
    fault("nan", 3, 1)
    run = train(tmp_path, dataset, **changes)
    assert "fault fired" in capsys.readouterr().out
    for name in ("model", "ema", "optimizer"):
        before, after, later = (
            load_file(run / f"checkpoints/step-{step:08d}/{name}.safetensors") for step in (3, 4, 5)
        )
        assert same(before, after), name  # BatchNorm's statistics and counters, too
        assert not same(after, later)
    assert results(run)["skipped_steps"] == 1
    assert metric_rows(run)[-1]["train/skipped_steps"] == 1


def test_steps_skipped_in_a_row_end_the_run(tmp_path, dataset, monkeypatch, capsys):
    scale_loss(monkeypatch, lambda step, n: torch.nan if step >= 3 and n == 0 else 1)
    stages = [{**ALL, "steps": 20}]
    run = train(tmp_path, dataset, code=1, stages=stages, optim={"skip_limit": 4})
    assert "4 steps in a row up to step 7 (stage all) were not taken" in capsys.readouterr().err
    assert results(run)["status"] == "failed"


def test_a_rate_that_is_not_as_planned_ends_the_run(tmp_path, dataset, monkeypatch, capsys):
    take_step = StageOptimizer.step

    def meddle(self):
        taken = take_step(self)
        self._optimizer.param_groups[0]["lr"] *= 1.0001
        return taken

    monkeypatch.setattr(StageOptimizer, "step", meddle)
    train(tmp_path, dataset, code=1)
    assert "the learning rate of head is" in capsys.readouterr().err


def test_out_of_memory_halves_the_microbatch_and_goes_on(tmp_path, dataset, fault, capsys):
    stages = [{**ALL, "steps": 6}]
    changes = {"stages": stages, "checkpoint": {"every": "1 step", "keep": 9}, "run__ledger": True}
    fault("oom", 3, 2)
    run = train(tmp_path, dataset, **changes)
    captured = capsys.readouterr()
    assert "fault fired" in captured.out
    assert "from step 3 on the canonical microbatch is 2" in captured.err
    assert results(run)["microbatch_halvings"] == [{"from_step": 3, "micro": 2}]
    assert results(run)["samples_seen"] == 6 * 16
    lines = [json.loads(x) for x in (run / "ledger/samples.jsonl").read_text().splitlines()]
    sizes = {step: [len(x["samples"]) for x in lines if x["step"] == step] for step in range(6)}
    assert sizes == {step: [4] * 4 if step < 3 else [2] * 8 for step in range(6)}
    # whatever the step that failed had left behind is gone: it is what a run of 2 would have made
    small = train(tmp_path, dataset, "small", **changes, batch={"global": 16, "micro": 2})
    samples = [[x["samples"] for x in lines if x["step"] == step] for step in (3, 4, 5)]
    lines = [json.loads(x) for x in (small / "ledger/samples.jsonl").read_text().splitlines()]
    assert samples == [[x["samples"] for x in lines if x["step"] == step] for step in (3, 4, 5)]


@pytest.mark.parametrize(
    ("batchnorm", "batch"),
    [("train", {"global": 4, "micro": 1}), ("stats", {"global": 1, "micro": "auto"})],
)
def test_batchnorm_that_learns_from_one_image_is_refused_before_the_first_stage(
    tmp_path, dataset, capsys, batchnorm, batch
):
    stages = [{**HEAD, "steps": 1}, {**ALL, "steps": 1, "batchnorm": batchnorm}]
    run = train(tmp_path, dataset, code=2, stages=stages, batch=batch)
    told = capsys.readouterr().err
    assert (
        f"batch.micro: is 1, and BatchNorm cannot learn from one image at a time (stages.1.batchnorm: {batchnorm})"
        in told
    )
    assert "batch.micro=2 to the command, or set batchnorm: frozen" in told
    assert "stage head" not in told
    assert not list(run.glob("checkpoints/*"))


def test_a_halving_leaves_two_images_to_batchnorm_of_a_later_stage(
    tmp_path, dataset, fault, capsys
):
    fault("oom", 0, 0)
    stages = [{**HEAD, "steps": 2}, {**ALL, "steps": 1, "batchnorm": "train"}]
    train(tmp_path, dataset, code=2, stages=stages, batch={"global": 4, "micro": 2})
    assert "batch.micro cannot be made smaller" in capsys.readouterr().err


def test_a_microbatch_of_one_that_does_not_fit_is_said(tmp_path, dataset, fault, capsys):
    fault("oom", 1, 2)
    stages = [{**ALL, "steps": 3, "batchnorm": "frozen"}]
    train(tmp_path, dataset, code=2, stages=stages, batch={"global": 4, "micro": 1})
    assert "batch.micro cannot be made smaller" in capsys.readouterr().err


def test_a_halving_keeps_what_was_counted(tmp_path, dataset, fault, monkeypatch):
    """A step skipped before it, and the training metrics of all the steps around it."""
    whole = train(
        tmp_path, dataset, "whole", stages=[{**ALL, "steps": 6}], run__log_every="6 steps"
    )
    seen: list[list[int]] = []
    import rtl_dist.training.stage_log as room

    metrics = room.train_metrics
    monkeypatch.setattr(
        room,
        "train_metrics",
        lambda counts, task: seen.append(counts) or metrics(counts, task=task),
    )
    fault("oom", 4, 3)
    scale_loss(monkeypatch, lambda step, _: torch.nan if step == 2 else 1)
    changes = {"stages": [{**ALL, "steps": 6}], "eval": {"every": "6 steps"}}
    run = train(tmp_path, dataset, "halved", run__log_every="6 steps", **changes)
    assert results(run)["microbatch_halvings"] == [{"from_step": 4, "micro": 2}]
    assert results(run)["skipped_steps"] == 1
    assert seen[-1][0] == 6 * 16  # samples
    assert results(whole)["skipped_steps"] == 0


@pytest.mark.parametrize("log_every", ["1 step", "50 steps"])
def test_one_step_without_any_number_does_not_end_a_run(tmp_path, dataset, monkeypatch, log_every):
    fired = []

    def factor(step: int, microbatch: int) -> float:
        if step != 2:
            return 1.0
        fired.append(microbatch)
        return torch.nan

    scale_loss(monkeypatch, factor)
    run = train(
        tmp_path,
        dataset,
        stages=[{**ALL, "steps": 6}],
        run__log_every=log_every,
        checkpoint={"every": log_every},
    )
    assert len(fired) == 4
    assert results(run)["skipped_steps"] == 1


def test_a_resume_may_take_smaller_microbatches(tmp_path, dataset, monkeypatch, capsys):
    changes = {"stages": [{**ALL, "steps": 6}], "checkpoint": {"every": "1 step"}}
    with killed_after(3, monkeypatch):
        train(tmp_path, dataset, **changes)
    train(tmp_path, dataset, code=2, **changes, batch={"global": 16, "micro": 8})
    assert "batch.micro was 4 and is 8" in capsys.readouterr().err
    run = train(tmp_path, dataset, **changes, batch={"global": 16, "micro": 2})
    assert results(run)["microbatch_halvings"] == [{"from_step": 3, "micro": 2}]


@pytest.mark.parametrize("ema", [0, 0.9])
def test_a_stop_while_evaluating_off_the_checkpoints_loses_nothing(
    tmp_path, dataset, monkeypatch, ema
):
    import os
    import signal

    import rtl_dist.training.stage_evaluator as room

    changes = {
        "stages": [{**ALL, "steps": 9}],
        "eval": {"every": "3 steps"},
        "checkpoint": {"every": "100 steps"},
        "optim": {"ema": ema},
    }
    whole = train(tmp_path, dataset, "whole", **changes)
    evaluate, calls = room.score_split, []

    def ask_and_evaluate(*arguments, **options):
        calls.append(True)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(room, "score_split", ask_and_evaluate)
        train(tmp_path, dataset, "stopped", code=75, **changes)
    assert newest_checkpoint(tmp_path / "stopped").name == "step-00000006"
    stopped = train(tmp_path, dataset, "stopped", **changes)
    for name in ("model", "ema", "optimizer"):
        assert same(weights(stopped, name), weights(whole, name)), name
    assert metric_rows(stopped) == metric_rows(whole)


def test_a_stage_that_ends_early_is_proved_and_saved(tmp_path, dataset, monkeypatch, capsys):
    stages = [{**HEAD, "steps": 40, "lr": 1e-9, "early_stop": {"patience": 2}}]
    changes = {"stages": stages, "eval": {"every": "2 steps"}, "checkpoint": {"every": "99 steps"}}
    train(tmp_path, dataset, **changes)
    capsys.readouterr()
    train(tmp_path, dataset, **changes)
    assert "already done" in capsys.readouterr().out
    step = StageTrainer.step

    def step_and_damage(self, rate_factor=None):
        outcome = step(self, rate_factor)
        if self._run.state.step == 5:
            with torch.no_grad():
                self._run.model.trunk.layer1[1].running_mean.add_(1e-6)
        return outcome

    monkeypatch.setattr(StageTrainer, "step", step_and_damage)
    train(tmp_path, dataset, "damaged", code=1, **changes)
    assert "a frozen weight or statistic moved" in capsys.readouterr().err


def test_patience_taken_away_at_a_resume_takes_nothing_back(tmp_path, dataset, monkeypatch):
    changes = {
        "stages": [{**ALL, "steps": 10, "lr": 3e-2}],
        "eval": {"every": "2 steps"},
        "checkpoint": {"every": "1 step"},
    }
    plain = train(tmp_path, dataset, "plain", **changes)
    with killed_after(6, monkeypatch):
        train(tmp_path, dataset, "killed", **changes, early_stop={"patience": 9})
    killed = train(tmp_path, dataset, "killed", **changes)
    digests = [results(run)["weights_sha256"] for run in (plain, killed)]
    assert digests[0] == digests[1]
