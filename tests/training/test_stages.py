"""Stages: what each may do otherwise than the run, how it ends, and what its steps survive."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_run import inject
from launched_runs import SCRIPT, environment
from safetensors.torch import load_file
from tiny_runs import (
    killed_after,
    make_dataset,
    metric_rows,
    newest_checkpoint,
    results,
    same,
    scale_loss,
    tiny_config,
    train,
    weights,
    write_config,
)

from rtl_dist.config import Config, parse_config
from rtl_dist.config.loader import to_dict
from rtl_dist.config.resolved_stage import resolve_stages
from rtl_dist.core.errors import UserError
from rtl_dist.training.stage_optimizer import StageOptimizer
from rtl_dist.training.stage_trainer import StageTrainer

pytestmark = pytest.mark.usefixtures("undrawn")
ALL = {"name": "all", "trainable": "all", "lr": 1e-2, "batchnorm": "train"}
HEAD = {"name": "head", "trainable": "head", "lr": 1e-2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _no_features_of_other_tests(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def fault(monkeypatch) -> Iterator[None]:
    """Lets ``inject`` change the trainer for one test."""
    monkeypatch.setattr(StageTrainer, "learn_from", StageTrainer.learn_from)
    return inject


# --- what a stage may do otherwise ---


def config_of(**changes: object) -> Config:
    tree = {"data": {"path": "x"}, "stages": [{"epochs": 1, **HEAD}]} | changes
    return parse_config(tree)


def test_a_stage_s_own_keys_change_only_what_they_say():
    config = config_of(
        augment={"mixup": 0.2, "erasing": 0.1},
        early_stop={"metric": "val/loss", "patience": 4},
        stages=[
            {"epochs": 1, **HEAD, "augment": {"erasing": 0.5}, "early_stop": {"patience": 1}},
            {"epochs": 1, **ALL, "image_size": 64, "schedule": "linear", "warmup": 0.5},
        ],
    )
    head, full = resolve_stages(config, num_samples=1000)
    assert (head.augment.erasing, head.augment.mixup) == (0.5, 0.2)
    assert full.augment == config.augment
    assert (head.early_stop.patience, head.early_stop.metric) == (1, "val/loss")
    assert full.patience == 4
    assert (head.image_size, full.image_size) == (224, 64)
    assert (head.schedule, full.schedule) == ("cosine", "linear")
    assert (head.warmup, full.warmup) == (0.05, 0.5)
    assert parse_config(to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"epochs": 1, **HEAD, "augment": {"erase": 1}}]}, "stages.0.augment.erase"),
        ({"stages": [{"epochs": 1, **HEAD, "lr": "best"}]}, "stages.0.lr"),
        (
            {"stages": [{"epochs": 1, **HEAD, "until": "plateau", "schedule": "cosine"}]},
            "stages.0.schedule: cosine falls towards an end",
        ),
        (
            {"data": {"path": "x", "sampling": "balanced"}, "optim": {"class_weights": "balanced"}},
            "choose one",
        ),
        ({"data": {"path": "x", "sampling": "balanced", "shuffle": "window"}}, "data.sampling"),
        ({"optim": {"logit_adjustment": 1, "loss": "bce"}}, "optim.logit_adjustment"),
    ],
)
def test_impossible_combinations_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(**changes)


def test_a_stage_s_own_pixels(tmp_path, dataset):
    """A smaller image, other augmentation: only in the stage that says so."""
    stages = [
        {**ALL, "name": "one", "steps": 2},
        {**ALL, "name": "two", "steps": 2, "image_size": 8, "augment": {"erasing": 1.0}},
        {**ALL, "name": "three", "steps": 2, "augment": {"hflip": 0.5}},
    ]

    def pixels(name: str, stages: list[dict]) -> list[int]:
        run = train(tmp_path, dataset, name, stages=stages, run__ledger=True)
        assert metric_rows(run)[-1]["step"] == 6
        lines = (run / "ledger/samples.jsonl").read_text().splitlines()
        return [json.loads(line)["pixels_crc32"] for line in lines]

    changed = pixels("changed", stages)
    plain = pixels("plain", [{k: v for k, v in s.items() if k not in ("image_size", "augment")}
                             for s in stages])  # fmt: skip
    per_stage = len(plain) // 3
    assert changed[:per_stage] == plain[:per_stage]
    assert not set(changed[per_stage : 2 * per_stage]) & set(plain)
    assert changed[2 * per_stage :] == plain[2 * per_stage :]  # what it says is the default


@pytest.mark.parametrize(
    ("trainable", "moving"),
    [
        ("layer2", {"layer2"}),
        ("layer2+", {"layer2", "layer3", "head"}),
        (["layer1", "layer3+"], {"layer1", "layer3", "head"}),
    ],
    ids=["layer2", "layer2+", "list"],
)
def test_parts_and_all_above_them(tmp_path, dataset, trainable, moving):
    def parts(run: Path) -> dict[str, torch.Tensor]:
        return weights(run)

    stage = {**ALL, "trainable": trainable}
    one = parts(train(tmp_path, dataset, "one", stages=[{**stage, "steps": 1}]))
    two = parts(train(tmp_path, dataset, "two", stages=[{**stage, "steps": 2}]))
    moved = {k.removeprefix("trunk.").split(".")[0] for k in one if not torch.equal(one[k], two[k])}
    assert moved == moving


# --- how a stage ends ---


def test_a_plateau_moves_on_at_a_constant_rate(tmp_path, dataset):
    stages = [
        {**HEAD, "name": "still", "steps": 40, "lr": 1e-9, "until": "plateau"},
        {**ALL, "name": "next", "steps": 4},
    ]
    run = train(tmp_path, dataset, stages=stages, eval={"every": "2 steps"})
    rows = [row for row in metric_rows(run) if "val/top1" in row]
    still = [row for row in rows if row["stage"] == "still"]
    assert [row["step"] for row in still] == [2, 4, 6]  # two that brought nothing better
    assert {row["lr/head"] for row in still[1:]} == {1e-9}
    assert rows[-1]["step"] == 10


def test_a_stage_with_patience_hands_its_best_weights_on(tmp_path, dataset):
    """A rate that destroys what was learned: the next stage begins from before."""
    stages = [
        {**ALL, "name": "wild", "steps": 30, "lr": 1.0, "early_stop": {"patience": 3}},
        {**HEAD, "name": "hold", "steps": 1, "lr": 1e-12},
    ]
    changes = {
        "stages": stages,
        "eval": {"every": "1 step"},
        "optim": {"name": "sgd", "schedule": "constant", "clip_grad_norm": None},
    }
    run = train(tmp_path, dataset, **changes)
    rows = [row for row in metric_rows(run) if "val/top1" in row]
    wild = [row for row in rows if row["stage"] == "wild"]
    best = max(wild, key=lambda row: (row["val/top1"], -row["val/loss"]))
    assert wild[-1]["val/loss"] != best["val/loss"]
    assert rows[-1]["stage"] == "hold"
    assert rows[-1]["val/loss"] == pytest.approx(best["val/loss"], rel=1e-5)


def test_a_stage_s_best_survives_a_kill(tmp_path, dataset, monkeypatch):
    changes = {
        "stages": [
            {**ALL, "name": "wild", "steps": 12, "lr": 3e-2, "early_stop": {"patience": 9}},
            {**HEAD, "name": "hold", "steps": 3},
        ],
        "eval": {"every": "2 steps"},
        "checkpoint": {"every": "1 step"},
        "optim": {"name": "sgd", "schedule": "constant", "clip_grad_norm": None},
    }
    whole = train(tmp_path, dataset, "whole", **changes)

    with killed_after(11, monkeypatch):
        train(tmp_path, dataset, "killed", **changes)
    killed = train(tmp_path, dataset, "killed", **changes)
    assert same(weights(killed), weights(whole))
    assert metric_rows(killed) == metric_rows(whole)


# --- steps that are not taken, memory that does not suffice ---


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
    stages = [{**HEAD, "steps": 40, "lr": 1e-9, "until": "plateau"}]
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


# --- features ---


CACHED = {"stages": [{**HEAD, "epochs": 4, "views": 2}]}


def test_damaged_features_are_computed_again(tmp_path, dataset, computed, capsys):
    folder = tmp_path / "features"
    one = train(tmp_path, dataset, "one", **CACHED, features={"cache_dir": str(folder)})
    assert len(computed) == 3
    for file in folder.glob("*/features.bin"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    two = train(tmp_path, dataset, "two", **CACHED, features={"cache_dir": str(folder)})
    assert len(computed) == 6
    assert "are damaged; computing them again" in capsys.readouterr().err
    assert same(weights(one), weights(two))


@pytest.mark.parametrize("change", ["weights", "augment", "seed", "image_size", "data"])
def test_features_of_something_else_are_not_taken(tmp_path, dataset, computed, change):
    train(tmp_path, dataset, "one", **CACHED)
    assert len(computed) == 3
    other = {
        "weights": {"model": {"name": "basic_cnn", "weights": str(tmp_path / "one")}},
        "augment": {"augment": {"hflip": 0.0}},
        "seed": {"seed": 6},
        "image_size": {"stages": [{**CACHED["stages"][0], "image_size": 8}]},
        "data": {},
    }[change]
    data = dataset if change != "data" else make_dataset_of_another_seed(tmp_path)
    if change == "weights":  # the trunk of another seed, but the run's own seed for the views
        train(tmp_path, dataset, "one", seed=6, run__dir=str(tmp_path / "other"), **CACHED)
        other["model"]["weights"] = str(tmp_path / "other")
    computed.clear()
    train(tmp_path, data, "two", **(CACHED | other))
    # a change of the training's looks leaves the validation images as they were; those of the
    # other weights were met when these were trained
    seen = ("augment", "image_size", "weights")
    expected = ["train", "train"] + ([] if change in seen else ["val"])
    assert sorted(computed) == expected


def make_dataset_of_another_seed(tmp_path: Path) -> Path:
    from tiny_runs import write_images

    from rtl_dist.prepare.packing.pack import pack

    images = write_images(tmp_path / "images", {"train": 19, "val": 7, "test": 5}, seed=1)
    pack(str(images), tmp_path / "packed", shard_size=20, workers=1, show_progress=False)
    return tmp_path / "packed"


def test_networks_with_the_same_weights_have_features_of_their_own(tmp_path, dataset, computed):
    """resnetaa50 is a resnet50 with blurred strides: the same names and shapes, other features."""
    from rtl_dist.config import DataConfig, ModelConfig
    from rtl_dist.core.files import save_tensors
    from rtl_dist.model.build import make_classifier

    model = make_classifier(
        ModelConfig(name="resnet50", weights="none"), DataConfig(path=""), num_classes=3, seed=0
    )
    save_tensors(model.native_state_dict(), tmp_path / "w.safetensors")
    for name in ("resnet50", "resnetaa50"):
        computed.clear()
        config = {"name": name, "weights": str(tmp_path / "w.safetensors")}
        train(tmp_path, dataset, name, model=config, stages=[{**HEAD, "epochs": 1, "views": 1}],
              data__image_size=32)  # fmt: skip
        assert sorted(computed) == ["train", "val"], name


def test_a_ledger_of_cached_activations(tmp_path, dataset):
    stage = {**ALL, "trainable": "layer2+", "epochs": 4, "views": 1}
    run = train(tmp_path, dataset, stages=[stage], run__ledger=True, precision="bf16")
    lines = [json.loads(x) for x in (run / "ledger/samples.jsonl").read_text().splitlines()]
    assert {line["pixels_crc32"] for line in lines} == {None}
    assert len(lines) == 4 * metric_rows(run)[-1]["step"]


def test_a_view_that_another_run_makes_meanwhile_is_taken(tmp_path, dataset, computed, monkeypatch):
    """The other run publishes both views while this one computes the first."""
    import rtl_dist.features.compute as room

    folder = str(tmp_path / "features")
    write, raced = room.write_block, []

    def race(place, first, rows):
        if not raced:
            raced.append(True)
            config = tiny_config(
                dataset, tmp_path / "other", **CACHED, features={"cache_dir": folder}
            )
            file = write_config(tmp_path / "other.yaml", config)
            done = subprocess.run([sys.executable, SCRIPT, "--config", file], env=environment())
            assert done.returncode == 0
        return write(place, first, rows)

    monkeypatch.setattr(room, "write_block", race)
    run = train(tmp_path, dataset, **CACHED, features={"cache_dir": folder})
    assert computed == ["train"]  # the other one was there by then, and the val split's
    assert same(weights(run), weights(tmp_path / "other"))
    names = [path.name for path in (tmp_path / "features").iterdir()]
    assert len(names) == 3
    assert not any(name.startswith(".") for name in names)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"cache_gb": 1e-6, "cache_dir": "features"}, "more than features.cache_gb allows"),
        ({"cache_dir": "/dev/null/x"}, "cannot be used"),
    ],
)
def test_without_room_the_head_is_trained_all_the_same(
    tmp_path, dataset, computed, capsys, monkeypatch, features, message
):
    monkeypatch.chdir(tmp_path)
    cached = train(tmp_path, dataset, "cached", **CACHED)
    computed.clear()
    run = train(tmp_path, dataset, **CACHED, features=features)
    assert computed == []
    assert message in capsys.readouterr().err
    assert same(weights(run), weights(cached))


def test_a_disk_that_fails_while_features_are_written(tmp_path, dataset, monkeypatch, capsys):
    import rtl_dist.features.compute as room

    cached = train(tmp_path, dataset, "cached", **CACHED)
    fired = []

    def fail(*_: object) -> int:
        fired.append(True)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(room, "write_block", fail)
    folder = tmp_path / "features"
    run = train(tmp_path, dataset, **CACHED, features={"cache_dir": str(folder)})
    assert fired
    assert "no cached features of train: " in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    assert same(weights(run), weights(cached))


def test_a_few_steps_are_not_worth_a_whole_view(tmp_path, dataset, computed):
    train(tmp_path, dataset, stages=[{**HEAD, "epochs": 0.5, "views": 1}])
    assert computed == ["val"]


def test_a_stop_while_features_are_computed_keeps_whole_views(
    tmp_path, dataset, computed, monkeypatch
):
    import os
    import signal

    import rtl_dist.features.compute as room

    write, blocks = room.write_block, []

    def ask_and_write(*arguments: object) -> int:
        blocks.append(True)
        if len(blocks) == 20:  # of 15 a view
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(room, "write_block", ask_and_write)
        train(tmp_path, dataset, code=75, **CACHED)
    assert computed == ["train", "train"]
    computed.clear()
    train(tmp_path, dataset, **CACHED)
    assert sorted(computed) == ["train", "val"]


# --- sampling, rates ---


def test_balanced_sampling_shows_small_classes_more_often(tmp_path):
    from tiny_runs import write_images

    from rtl_dist.data.format.dataset import open_dataset
    from rtl_dist.prepare.packing.pack import pack

    images = write_images(tmp_path / "images", {"train": 20, "val": 4})
    for file in sorted((images / "train" / "red").iterdir())[2:]:
        file.unlink()
    pack(str(images), tmp_path / "packed", workers=1, show_progress=False)
    run = train(
        tmp_path,
        tmp_path / "packed",
        data__sampling="balanced",
        run__ledger=True,
        stages=[{**HEAD, "steps": 6, "views": 2}],
    )
    split = open_dataset(tmp_path / "packed").split("train")
    lines = (run / "ledger/samples.jsonl").read_text().splitlines()
    samples = [n for line in lines for n in json.loads(line)["samples"]]
    counts = torch.bincount(torch.from_numpy(split.labels(samples)))
    assert counts.tolist() == [32, 32, 32]


def test_the_rate_found_is_the_same_after_a_kill(tmp_path, dataset, monkeypatch):
    changes = {
        "stages": [
            {**HEAD, "steps": 4, "lr": "auto", "views": 1},
            {**ALL, "steps": 4, "lr": "auto"},
        ],
        "checkpoint": {"every": "1 step"},
    }
    whole = train(tmp_path, dataset, "whole", **changes)
    found = {
        path.stem: json.loads(path.read_text()) for path in (whole / "lr_finder").glob("*.json")
    }
    assert set(found) == {"head", "all"}
    for name, part in (("head", found["head"]), ("all", found["all"])):
        highest = max(row["lr/head"] for row in metric_rows(whole) if row["stage"] == name)
        assert 1e-6 <= highest <= part["lr"] <= 0.1

    with killed_after(6, monkeypatch):
        train(tmp_path, dataset, "killed", **changes)
    (tmp_path / "killed" / "lr_finder" / "all.json").unlink()
    killed = train(tmp_path, dataset, "killed", **changes)
    assert not (killed / "lr_finder" / "all.json").exists()  # not looked for again
    assert same(weights(killed), weights(whole))
