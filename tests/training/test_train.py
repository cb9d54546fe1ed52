"""Whole runs in this process: what each stage really does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    CLASSES,
    damage,
    make_dataset,
    metric_rows,
    newest_checkpoint,
    same,
    tiny_config,
    train,
    weights,
    write_config,
    write_images,
)

from rtl_dist.cli import main as cli
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.model.folder import load_model
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.train import main

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def evaluate(model: Path, dataset: Path, out: Path, *options: str) -> dict[str, float]:
    """What ``rtl-dist evaluate`` writes of the val split."""
    where = ["--data", str(dataset), "--split", "val", "--out", str(out), "--workers", "0"]
    assert cli(["evaluate", str(model), *where, *options]) == 0
    metrics: dict[str, float] = json.loads((out / "metrics.json").read_text())
    return metrics


def test_validation_images_are_decoded_once(tmp_path, dataset, monkeypatch):
    import rtl_dist.evaluation.logits as room

    stages = [{"name": "all", "steps": 6, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}]
    opened = []
    make = room.make_loader
    monkeypatch.setattr(room, "make_loader", lambda *a, **k: opened.append(True) or make(*a, **k))
    kept = train(tmp_path, dataset, "kept", stages=stages, eval={"every": "2 steps"})
    assert len(opened) == 1
    monkeypatch.setattr(Runtime, "kept_bytes", 0)
    again = train(tmp_path, dataset, "again", stages=stages, eval={"every": "2 steps"})
    assert len(opened) == 1 + 3 + 1  # it is calibrated on them, too
    assert metric_rows(kept) == metric_rows(again)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_has_the_kernels_that_its_config_asks_for(tmp_path, dataset, monkeypatch, wanted):
    asked = []
    monkeypatch.setattr("rtl_dist.distributed.runtime.set_determinism", asked.append)
    stages = [{"name": "head", "steps": 1, "trainable": "head", "lr": 1e-2}]
    train(tmp_path, dataset, stages=stages, deterministic=wanted)
    assert asked == [wanted]


def test_only_the_trainable_parts_of_a_stage_move(tmp_path, dataset):
    head = {"name": "head", "steps": 4, "trainable": "head", "lr": 0.1}
    one = weights(train(tmp_path, dataset, "one", stages=[head]))
    two = weights(train(tmp_path, dataset, "two", stages=[{**head, "steps": 8}]))
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved == {"head.weight", "head.bias"}
    top = {**head, "trainable": ["layer3", "head"], "batchnorm": "train"}
    three = weights(train(tmp_path, dataset, "three", stages=[top]))
    assert one.keys() - three.keys() == {"head.mean", "head.scale"}  # where it alone is trained
    moved = {name.split(".")[1] for name in three if not torch.equal(one[name], three[name])}
    assert moved == {"layer3", "weight", "bias"}
    assert not torch.equal(three["trunk.layer3.1.running_mean"], one["trunk.layer3.1.running_mean"])


def test_a_frozen_weight_that_moves_ends_the_run(tmp_path, dataset, monkeypatch, capsys):
    import rtl_dist.training.stage_trainer as room

    take_step = room.StageTrainer.step
    fired = []

    def step_and_damage(self):
        outcome = take_step(self)
        with torch.no_grad():
            self._run.model.trunk.layer1[1].running_mean.add_(1e-6)
        fired.append(True)
        return outcome

    monkeypatch.setattr(room.StageTrainer, "step", step_and_damage)
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run"))
    assert main(["--config", config]) == 1
    assert fired
    assert "a frozen weight or statistic moved" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": "head"},
        {"trainable": ["layer3", "head"], "batchnorm": "train"},
        {"trainable": "layer2+", "batchnorm": "stats"},
    ],
    ids=str,
)
def test_cached_features_train_the_same_weights_bit_for_bit(tmp_path, dataset, computed, changes):
    stage = {"name": "top", "epochs": 6, "lr": 0.05, "views": 2, **changes}
    optim = {"clip_grad_norm": None}
    features = {"cache_dir": str(tmp_path / "features")}

    def weights_of(name: str, cache: str) -> dict[str, torch.Tensor]:
        stages = [{**stage, "cache": cache}]
        run = train(tmp_path, dataset, name, stages=stages, optim=optim, features=features)
        rows.append(metric_rows(run))
        return weights(run)

    rows: list[list[dict]] = []
    plain = weights_of("plain", "off")
    assert computed == []
    cached = weights_of("cached", "auto")
    assert sorted(computed) == ["train", "train", "val"]
    again = weights_of("again", "auto")
    assert sorted(computed) == ["train", "train", "val"]  # a later run finds them
    assert same(cached, plain)
    assert same(again, plain)
    assert rows[0] == rows[1] == rows[2]  # to the last bit, the evaluations too


def test_views_cycle_and_a_null_view_never_repeats(tmp_path, dataset):
    stage = {"name": "s", "epochs": 4, "trainable": "all", "lr": 1e-3}

    def pixels_by_epoch(run: Path) -> list[set[int]]:
        lines = [json.loads(x) for x in (run / "ledger/samples.jsonl").read_text().splitlines()]
        return [
            {line["pixels_crc32"] for line in lines if line["step"] // 21 == e} for e in range(4)
        ]

    # microbatches of one image, one a step, so that 21 steps are an epoch
    changes = {"run__ledger": True, "batch": {"global": 1, "micro": 1}, "data__train": "val"}
    two = pixels_by_epoch(
        train(tmp_path, dataset, "two", stages=[{**stage, "views": 2}], **changes)
    )
    assert two[0] == two[2] != two[1] == two[3]
    free = pixels_by_epoch(train(tmp_path, dataset, "free", stages=[stage], **changes))
    assert all(not (free[i] & free[j]) for i in range(4) for j in range(i))


def test_averaged_weights_are_what_is_evaluated_and_kept(tmp_path, dataset):
    stages = [{"name": "all", "steps": 8, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}]
    run = train(tmp_path, dataset, stages=stages, optim={"ema": 0.5}, eval={"every": "8 steps"})
    best = load_model(run).model.state_dict()
    average, trained = weights(run, "ema"), weights(run)
    assert not same(average, trained)
    measured = {k for k in average if "running" in k or "num_batches" in k}
    assert same({k: best[k] for k in average if k not in measured},
                {k: average[k] for k in average if k not in measured})  # fmt: skip
    assert not any(torch.equal(best[k], average[k]) for k in measured if "running" in k)
    one = train(tmp_path, dataset, "averaged", stages=stages, eval={"every": "8 steps"},
                optim={"ema": 0.5, "ema_batchnorm": "averaged"})  # fmt: skip
    assert same({k: load_model(one).model.state_dict()[k] for k in average}, average)


def test_an_average_is_judged_as_it_is_kept_in_a_cached_stage_too(tmp_path, dataset):
    stages = [
        {"name": "all", "steps": 6, "trainable": "all", "lr": 1e-2, "batchnorm": "train"},
        {"name": "head", "steps": 6, "trainable": "head", "lr": 1e-2, "views": 2},
    ]
    run = train(tmp_path, dataset, stages=stages, optim={"ema": 0.95}, eval={"every": "6 steps"})
    last = metric_rows(run)[-1]
    assert last["stage"] == "head"
    raw = evaluate(newest_checkpoint(run), dataset, tmp_path / "raw")
    best = json.loads((run / "results.json").read_text())["best"]
    kept = evaluate(run, dataset, tmp_path / "best", "--raw")
    assert kept["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert raw["loss"] != pytest.approx(last["val/loss"], rel=1e-3)


def test_a_metric_the_data_does_not_have_is_refused_at_once(tmp_path, dataset, capsys):
    config = tiny_config(dataset, tmp_path / "run", early_stop={"metric": "val/map"})
    assert main(["--config", write_config(tmp_path / "c.yaml", config)]) == 2
    assert (
        "val/map is not measured on single_label data; choose val/top1" in capsys.readouterr().err
    )


def test_patience_ends_a_stage_early_and_the_next_begins_there(tmp_path, dataset):
    stages = [
        {"name": "still", "steps": 40, "trainable": "head", "lr": 1e-9},
        {"name": "next", "steps": 4, "trainable": "head", "lr": 1e-9},
    ]
    run = train(
        tmp_path, dataset, stages=stages, early_stop={"patience": 2}, eval={"every": "2 steps"}
    )
    rows = [row for row in metric_rows(run) if "val/top1" in row]
    assert [row["step"] for row in rows if row["stage"] == "still"] == [2, 4, 6]
    assert rows[-1]["stage"] == "next"
    assert rows[-1]["step"] == 10


def test_multi_label_from_csv_to_map(tmp_path):
    images = write_images(tmp_path / "images", {"train": 8, "val": 4})
    for split in ("train", "val"):
        lines = ["file,blue,green,red"]
        for path in sorted((images / split).rglob("*.png")):
            flags = ["1" if path.parent.name == name else "0" for name in CLASSES]
            flags[0] = "1"  # every picture is blue too, one way or another
            lines.append(f"{path.relative_to(images)},{','.join(flags)}")
        (images / f"{split}.csv").write_text("\n".join(lines) + "\n")
    csvs = tmp_path / "csvs"
    csvs.mkdir()
    for path in images.iterdir():
        path.rename(csvs / path.name)
    pack(str(csvs), tmp_path / "packed", workers=1, show_progress=False)
    run = train(tmp_path, tmp_path / "packed", data__test=None)
    last = metric_rows(run)[-1]
    assert last["val/map"] > 0.6
    assert {"val/micro_f1", "val/macro_f1", "gap/micro_f1"} <= last.keys()
    results = json.loads((run / "results.json").read_text())
    assert results["best"]["metric"] == "val/map"
    assert results["test"] is None


def test_the_source_is_packed_by_the_job_itself(tmp_path):
    images = write_images(tmp_path / "images", {"train": 4, "val": 2})
    config = tiny_config(tmp_path / "made", tmp_path / "run", data__source=str(images))
    config["stages"] = config["stages"][:1]
    assert main(["--config", write_config(tmp_path / "c.yaml", config)]) == 0
    assert open_dataset(tmp_path / "made").split("train").num_samples == 12


def test_damaged_samples_within_the_budget_are_replaced_and_named(tmp_path, capsys):
    data = make_dataset(tmp_path)
    damage(data, "train", 3)
    stages = [{"name": "all", "epochs": 2, "trainable": "all", "lr": 1e-3}]
    config = tiny_config(data, tmp_path / "strict", stages=stages)
    assert main(["--config", write_config(tmp_path / "strict.yaml", config)]) == 3
    assert "fails its checksum" in capsys.readouterr().err
    run = train(tmp_path, data, "lenient", stages=stages, data__bad_samples=1)
    bad = json.loads((run / "results.json").read_text())["bad_samples"]
    assert bad["count"] == 1
    assert "sample 3 of split 'train'" in bad["names"][0]
    rows = metric_rows(run)
    assert [row["data/bad_names"] for row in rows if "data/bad_names" in row] == bad["names"]
    assert rows[-1]["data/bad_samples"] == 1


def test_a_diverging_loss_ends_the_run_before_it_is_saved(tmp_path, dataset, capsys):
    stages = [{"name": "wild", "steps": 8, "trainable": "all", "lr": 1e30, "batchnorm": "train"}]
    config = tiny_config(
        dataset,
        tmp_path / "run",
        stages=stages,
        optim={"clip_grad_norm": None, "name": "sgd", "warmup": 0},
    )
    assert main(["--config", write_config(tmp_path / "c.yaml", config)]) == 1
    error = capsys.readouterr().err
    assert "stage wild" in error
    assert "Traceback" not in error
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        saved = load_file(checkpoint / "model.safetensors")
        assert all(np.isfinite(v.numpy()).all() for v in saved.values() if v.is_floating_point())


def test_a_part_the_model_does_not_have_is_refused_at_once(tmp_path, dataset, capsys):
    config = tiny_config(dataset, tmp_path / "run", stages__1__trainable=["layer9", "head"])
    assert main(["--config", write_config(tmp_path / "c.yaml", config)]) == 2
    assert "no part 'layer9'; did you mean layer" in capsys.readouterr().err
