"""Stages whose head is solved: alone, before and after others, stopped, and on damaged images."""

import json
from pathlib import Path

import pytest
import torch
from killed_runs import require_done, run_ranks
from report_helpers import assert_self_contained
from tiny_runs import (
    CLASSES,
    Killed,
    damage,
    make_dataset,
    metric_rows,
    newest_checkpoint,
    require_equal_runs,
    results,
    tiny_config,
    train,
    weights,
    weights_at,
    write_config,
    write_images,
)

from rtl_dist.config import load_config, parse_config
from rtl_dist.config.resolved_stage import resolve_stages
from rtl_dist.core.errors import UserError
from rtl_dist.features import writing
from rtl_dist.model.folder import load_model
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.training import solving
from rtl_dist.training.stage_evaluator import StageEvaluator

pytestmark = pytest.mark.usefixtures("own_features")
SOLVED = {"name": "head", "trainable": "head", "solve": True}
ALL = {"name": "all", "trainable": "all", "lr": 1e-2, "batchnorm": "train", "steps": 3}
undrawn = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


# --- where it stands among the stages ---


def test_a_solved_head_is_a_whole_run(tmp_path, dataset, capsys):
    run = train(tmp_path, dataset, stages=[SOLVED], data__test="test")
    (row,) = metric_rows(run)
    assert (row["step"], row["epoch"], row["stage"]) == (0, 0, "head")
    assert row["gap/top1"] == row["train/top1"] - row["val/top1"]
    assert row["train/top1"] > 0.8
    assert not [key for key in row if key.startswith("lr/")]  # no step was taken at any
    assert row["val/top1"] > 0.6
    assert saved_steps(run) == [0]
    found = results(run)
    assert (found["status"], found["steps"]) == ("done", 0)
    assert found["best"]["value"] == row["val/top1"]
    assert found["test"]["num_samples"] == 15
    assert_self_contained(run / "report.html")
    reached = f"best val/top1 {row['val/top1']:.4f} (stage head, epoch 0.0)"
    assert reached in capsys.readouterr().out
    train(tmp_path, dataset, stages=[SOLVED], data__test="test")
    assert "already done" in capsys.readouterr().out
    assert metric_rows(run) == [row]


@undrawn
def test_its_head_is_the_same_in_the_checkpoint_and_in_best(tmp_path, dataset):
    run = train(tmp_path, dataset, stages=[SOLVED], optim={"ema": 0.9})
    saved, averaged = weights(run), weights(run, "ema")
    assert not {"head.mean", "head.scale"} & saved.keys()
    head = load_model(run).model.head.state_dict()
    for name, value in head.items():
        assert torch.equal(value, saved[f"head.{name}"])
        assert torch.equal(value, averaged[f"head.{name}"])


@undrawn
@pytest.mark.parametrize("length", [{}, {"epochs": 0}, {"steps": 0}], ids=str)
def test_the_next_stage_begins_with_it(tmp_path, dataset, length):
    run = train(tmp_path, dataset, stages=[SOLVED | length, ALL], eval={"every": "1 step"})
    rows = [row for row in metric_rows(run) if "val/loss" in row]
    assert [(row["step"], row["stage"]) for row in rows] == [
        (0, "head"), (1, "all"), (2, "all"), (3, "all")
    ]  # fmt: skip
    alone = train(tmp_path, dataset, "alone", stages=[SOLVED], eval={"every": "1 step"})
    assert rows[0] == metric_rows(alone)[0]


@undrawn
def test_a_trained_trunk_is_given_the_head_that_fits_it(tmp_path, dataset):
    stages = [ALL, SOLVED, {**ALL, "name": "end", "steps": 1}]
    run = train(tmp_path, dataset, stages=stages)
    rows = [row for row in metric_rows(run) if "val/loss" in row]
    assert [(row["step"], row["stage"]) for row in rows] == [(3, "all"), (3, "head"), (4, "end")]
    assert rows[1]["train/loss"] < rows[0]["train/loss"]

    last = train(tmp_path, dataset, "last", stages=stages[:2])
    assert saved_steps(last) == [3]
    state = json.loads((newest_checkpoint(last) / "state.json").read_text())["state"]
    # there is always a whole one: none of the same step takes its place, the head is solved again
    assert state["stage"] == 0
    assert results(last)["steps"] == 3
    trained = train(tmp_path, dataset, "trained", stages=stages[:1])
    assert results(last)["weights_sha256"] != results(trained)["weights_sha256"]


@undrawn
def test_it_is_evaluated_before_its_steps_however_rarely_else(tmp_path, dataset):
    stage = SOLVED | {"epochs": 2, "lr": 1e-3, "views": 1}
    run = train(tmp_path, dataset, stages=[stage], eval={"every": "1 epoch"})
    rows = [row for row in metric_rows(run) if "val/loss" in row]
    assert rows[0]["step"] == 0
    alone = train(tmp_path, dataset, "alone", stages=[SOLVED])
    assert {k: v for k, v in rows[0].items() if k != "elapsed_s"} == {
        k: v for k, v in metric_rows(alone)[0].items() if k != "elapsed_s"
    }


@undrawn
def test_steps_go_on_from_the_solution(tmp_path, dataset):
    changes = {"eval": {"every": "1 step"}, "model__dropout": 0.0}
    alone = train(tmp_path, dataset, "alone", stages=[SOLVED], **changes)
    stage = SOLVED | {"steps": 3, "lr": 1e-12, "views": 1}
    run = train(tmp_path, dataset, stages=[stage], **changes)
    rows = metric_rows(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["val/loss"] == pytest.approx(metric_rows(alone)[0]["val/loss"], rel=1e-4)
    assert "head.mean" in weights(run)
    assert load_model(run).model.head.mean is None


# --- stopped and gone on with ---


@undrawn
@pytest.mark.parametrize("moment", ["features", "solving", "evaluation"])
@pytest.mark.parametrize(
    "stages",
    [[SOLVED], [ALL, SOLVED | {"steps": 2}, ALL | {"name": "end", "steps": 1}]],
    ids=["alone", "between"],
)
def test_it_goes_on_after_a_kill(tmp_path, dataset, monkeypatch, moment, stages):
    ema = 0.9 if stages == [SOLVED] else 0.0
    changes = {"stages": stages, "optim": {"ema": ema}, "checkpoint": {"every": "1 step"}}
    whole = train(tmp_path, dataset, "whole", **changes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    place = {
        "features": (writing, "write_block"),
        "solving": (solving, "solve"),
        "evaluation": (StageEvaluator, "metrics"),
    }[moment]
    calls, original = [], getattr(*place)

    def die(*arguments, **named):
        calls.append(1)
        if len(calls) == (2 if moment == "evaluation" and len(stages) == 3 else 1):
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(*place, die)
        with pytest.raises(Killed):
            train(tmp_path, dataset, "killed", **changes)
    if moment == "evaluation" and len(stages) == 1:
        assert saved_steps(tmp_path / "killed") == [0]
        assert not (tmp_path / "killed" / "best").exists()
    require_equal_runs(whole, train(tmp_path, dataset, "killed", **changes))


# --- data ---


@undrawn
def test_damaged_images_within_the_budget_are_replaced_and_counted(tmp_path, capsys):
    data = make_dataset(tmp_path)
    damage(data, "train", 3)
    damage(data, "train", 30)
    strict = train(tmp_path, data, "strict", code=3, stages=[SOLVED], data__bad_samples=1)
    assert "2 damaged sample(s), data.bad_samples allows 1" in capsys.readouterr().err
    assert not (strict / "best").exists()
    run = train(tmp_path, data, stages=[SOLVED, ALL], data__bad_samples=2)
    first = metric_rows(run)[0]
    assert first["data/bad_samples"] == 2
    assert first["data/bad_names"].count("fails its checksum") == 2
    assert metric_rows(run)[-1]["data/bad_samples"] == 2


@undrawn
def test_several_labels(tmp_path):
    images = write_images(tmp_path / "images", {"train": 8, "val": 4})
    for split in ("train", "val"):
        lines = ["file,blue,green,red"]
        for path in sorted((images / split).rglob("*.png")):
            flags = ["1" if path.parent.name in (name, "red") else "0" for name in CLASSES]
            lines.append(f"{path.relative_to(images)},{','.join(flags)}")
        (images / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "csvs").mkdir()
    for path in images.iterdir():
        path.rename(tmp_path / "csvs" / path.name)
    pack(str(tmp_path / "csvs"), tmp_path / "packed", workers=1, show_progress=False)
    run = train(tmp_path, tmp_path / "packed", stages=[SOLVED])
    (row,) = metric_rows(run)
    assert row["val/map"] > 0.9
    assert row["train/micro_f1"] > 0.9
    assert "gap/micro_f1" in row


@undrawn
def test_grey_images(tmp_path, dataset):
    (row,) = metric_rows(train(tmp_path, dataset, stages=[SOLVED], data__channels=1))
    assert row["train/loss"] < 1.1


# --- what it cannot do ---


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ({"trainable": "all"}, {}, "stages.0.solve: only a head can be solved"),
        ({"trainable": ["layer3", "head"]}, {}, "stages.0.solve: only a head can be solved"),
        ({"solve": False, "epochs": 1}, {}, "stages.0.lr: is required"),
        ({"solve": False, "lr": 1.0}, {}, "stages.0.epochs: a stage has either epochs or steps"),
        ({"steps": -1}, {}, "stages.0.steps: must be positive"),
        ({"optim": {"loss": "focal"}}, {}, "set stages.0.optim.loss to another"),
        ({}, {"optim": {"loss": "focal"}}, "set optim.loss to another"),
        (
            {},
            {"stages": [ALL, SOLVED], "optim": {"ema": 0.9}},
            "stages.1.solve: the averaged weights of the stages before make other features",
        ),
        (
            {},
            {"data": {"path": "x", "backend": "stream", "stream_urls": "x"}},
            "stages.0.solve: needs data.backend: indexed",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_solved_is_refused_by_name(stage, changes, message):
    tree = {"data": {"path": "x"}, "stages": [SOLVED | stage]} | changes
    with pytest.raises(UserError, match=message):
        parse_config(tree)


@undrawn
@pytest.mark.parametrize("limit", ["cache: off", "no room"])
def test_without_the_store_its_head_is_the_same(tmp_path, dataset, limit):
    stage, features = dict(SOLVED), {"cache_dir": str(tmp_path / "features")}
    whole = train(tmp_path, dataset, "whole", stages=[SOLVED])
    if limit == "no room":
        features["cache_gb"] = 1e-6
    else:
        stage["cache"] = "off"
    run = train(tmp_path, dataset, stages=[stage], features=features)
    assert not list((tmp_path / "features").glob("*/features.bin"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(run)[name]), name
    assert metric_rows(run)[0]["val/loss"] == metric_rows(whole)[0]["val/loss"]


def test_a_length_can_be_given_from_outside(tmp_path):
    file = write_config(
        tmp_path / "c.yaml",
        {"data": {"path": "x"}, "stages": [SOLVED], "batch": {"global": 64}},
    )
    for overrides, steps, lr in (([], 0, 1e-3), (["stages.0.epochs=2"], 5, 1e-3),
                                 (["stages.0.steps=4", "stages.0.lr=0.1"], 4, 0.1)):  # fmt: skip
        (stage,) = resolve_stages(load_config(file, overrides), num_samples=150)
        assert (stage.num_steps, stage.lr) == (steps, lr)


# --- several processes ---


@pytest.mark.launch
@undrawn
def test_the_solution_does_not_depend_on_the_number_of_processes(tmp_path, dataset):
    """Rank 0 solves: to the bit on the same cached features, to rounding where each count of
    processes computes its own."""
    stepped = [SOLVED | {"steps": 2}, ALL | {"steps": 1}]
    for name, world_size, features, stages in (
        ("one", 1, "a", [SOLVED]),
        ("two", 2, "a", [SOLVED]),
        ("three", 1, "a", stepped),
        ("four", 2, "b", stepped),
        ("five", 2, "c", [SOLVED | {"cache": "off"}]),
    ):
        changes = {"stages": stages, "checkpoint": {"every": "1 step", "keep": 9}}
        changes |= {"features": {"cache_dir": str(tmp_path / features)}, "precision": "fp64"}
        config = tiny_config(dataset, tmp_path / name, **changes)
        file = write_config(tmp_path / "c.yaml", config)
        require_done(run_ranks(file, world_size=world_size))
    require_equal_runs(tmp_path / "one", tmp_path / "two")
    for step, names in (
        (0, ("three", "four")), (3, ("three", "four")), (0, ("one", "five"))
    ):  # fmt: skip
        one, two = (weights_at(tmp_path / name, step) for name in names)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-9)
