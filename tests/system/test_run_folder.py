"""What a whole run leaves: all that was promised, drawn."""

import json
import re

import pytest
import yaml
from tiny_runs import make_dataset, metric_rows, train

from rtl_dist.data.format.dataset import open_dataset


def test_a_run_learns_and_leaves_the_promised_folder(tmp_path, capsys):
    dataset = make_dataset(tmp_path)
    run = train(tmp_path, dataset, data__test="test")
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "rtl-dist evaluate" in last_line
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "done"
    assert results["frozen_ok"] is True
    assert results["samples_seen"] == 20 * 16
    assert results["test"]["num_samples"] == 15
    assert results["best"]["value"] > 0.8
    assert results["dataset_fingerprint"] == open_dataset(dataset).fingerprint
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["early_stop"]["metric"] == "val/top1"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 1
    rows = metric_rows(run, timing=True)
    evaluated = [row for row in rows if "val/top1" in row]
    assert [row["step"] for row in evaluated] == [5, 6, 10, 12, 15, 20]
    promised = {"train/loss", "gap/top1", "val/loss", "val/top5", "lr/head", "epoch", "stage"}
    promised |= {"elapsed_s", "speed/images_per_second", "speed/data_wait"}
    assert promised <= evaluated[-1].keys()
    last = evaluated[-1]
    assert last["gap/top1"] == pytest.approx(last["train/top1"] - last["val/top1"])
    for name in ("loss", "accuracy", "learning_rate"):
        assert (run / "plots" / f"{name}.png").stat().st_size > 1000
    assert "<html" in (run / "report.html").read_text()
    assert (run / "evaluation" / "test" / "confusion_matrix.png").exists()


def test_a_solved_head_is_told_without_rates_or_speed(tmp_path, capsys):
    stages = [
        {"name": "head", "trainable": "head", "solve": True},
        {"name": "all", "trainable": "all", "lr": 1e-2, "steps": 2},
    ]
    run = train(tmp_path, make_dataset(tmp_path), stages=stages)
    assert re.search(
        r"^[\d:]{8} stage head: solving 387 of [\d,]+ parameters, without steps$",
        capsys.readouterr().err,
        re.MULTILINE,
    )
    solved, *stepped = metric_rows(run, timing=True)
    assert (solved["step"], solved["stage"]) == (0, "head")
    assert {"train/top1", "val/top1", "gap/top1", "elapsed_s"} <= solved.keys()
    assert not [name for name in solved if name.startswith(("lr/", "speed/"))]
    assert all("lr/head" in row for row in stepped)
    assert "solved takes no steps" in (run / "report.html").read_text()
