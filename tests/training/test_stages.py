"""Stages: what each may do otherwise than the run, and how it ends."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    killed_after,
    make_dataset,
    metric_rows,
    same,
    train,
    weights,
)

from rtl_dist.config import Config, parse_config
from rtl_dist.config.loader import to_dict
from rtl_dist.config.resolved_stage import resolve_stages
from rtl_dist.core.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
ALL = {"name": "all", "trainable": "all", "lr": 1e-2, "batchnorm": "train"}
HEAD = {"name": "head", "trainable": "head", "lr": 1e-2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


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


def test_a_stage_without_anything_better_moves_on(tmp_path, dataset):
    stages = [
        {
            **HEAD,
            "name": "still",
            "steps": 40,
            "lr": 1e-9,
            "schedule": "constant",
            "early_stop": {"patience": 2},
        },
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
