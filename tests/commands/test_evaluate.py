"""``rtl-dist evaluate``: the figures of a run again, whoever asks."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from killed_runs import require_done, run_command
from tiny_runs import make_dataset, results, train, write_images

from rtl_dist.cli import main
from rtl_dist.prepare.packing.pack import pack

TABLES = ("metrics.json", "predictions.csv", "per_class.csv", "confusion_matrix.csv")
STAGES = [{"name": "head", "steps": 4, "trainable": "head", "lr": 1e-2}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    return train(tmp_path_factory.mktemp("run"), dataset, data__test="test", stages=STAGES)


def written_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def test_it_writes_what_the_end_of_the_run_wrote(run, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["evaluate", str(run), "--data", str(dataset), "--out", str(out), "--workers", "0"]
    assert main(words) == 0
    assert written_in(out) == written_in(run / "evaluation" / "test")
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["file"].startswith(f"test/{row['truth']}/") for row in rows)
    metrics = json.loads((out / "metrics.json").read_text())
    of_the_run = results(run)["test"]
    assert of_the_run == {name: metrics[name] for name in of_the_run}
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"test: top1 {metrics['top1']:.4f}, macro_f1 {metrics['macro_f1']:.4f},"
        f" loss {metrics['loss']:.4f}, ece {metrics['ece']:.4f} (raw {metrics['ece_raw']:.4f})"
        f" on 15 images. See {out}/report.html"
    )
    for page, title in ((out, f"{run} on test"), (run / "evaluation" / "test", "run: test")):
        assert f"<title>{title}</title>" in (page / "report.html").read_text()


def test_the_best_weights_give_the_metrics_that_were_reported(run, dataset, capsys):
    assert main(["evaluate", str(run), "--data", str(dataset), "--split", "val"]) == 0
    metrics = json.loads((run / "evaluation" / "val" / "metrics.json").read_text())
    assert metrics["num_samples"] == 21
    assert metrics["top1"] == pytest.approx(results(run)["best"]["value"])
    assert "Evaluation on val" in (run / "report.html").read_text()


def test_a_precision_that_this_device_lacks_is_told(run, dataset, tmp_path, capsys):
    model = tmp_path / "from-a-gpu"
    shutil.copytree(run / "best", model)
    described = (model / "config.json").read_text()
    assert '"precision": "no"' in described
    (model / "config.json").write_text(
        described.replace('"precision": "no"', '"precision": "fp16"')
    )
    assert main(["evaluate", str(model), "--data", str(dataset), "--workers", "0"]) == 0
    told = capsys.readouterr().err
    assert "trained in fp16, which is not for this device (cpu, " in told
    assert main(["evaluate", str(run), "--data", str(dataset), "--workers", "0"]) == 0
    assert "trained in" not in capsys.readouterr().err


def test_raw_figures_are_those_of_the_training(run, dataset, tmp_path):
    figures = {}
    for options in ((), ("--raw",)):
        out = tmp_path / ("out" + "".join(options))
        words = ["evaluate", str(run), "--data", str(dataset), "--split", "val", "--out", str(out)]
        assert main([*words, *options]) == 0
        figures[options] = json.loads((out / "metrics.json").read_text())
    calibrated, raw = figures[()], figures["--raw",]
    assert raw["loss"] == pytest.approx(results(run)["best"]["loss"])
    assert (calibrated["loss_raw"], calibrated["ece_raw"]) == (raw["loss"], raw["ece"])
    assert calibrated["ece"] != raw["ece"]
    assert calibrated["top1"] == raw["top1"]
    assert not {"ece_raw", "set_coverage", "answered"} & raw.keys()


def test_without_a_test_split_val_is_taken(run, tmp_path, capsys):
    images = write_images(tmp_path / "images", {"train": 2, "val": 2})
    pack(str(images), tmp_path / "packed", workers=1, show_progress=False)
    words = ["evaluate", str(run), "--data", str(tmp_path / "packed"), "--out", str(tmp_path / "o")]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("val: top1 ")


def test_a_split_that_is_not_there_is_named(run, dataset, capsys):
    assert main(["evaluate", str(run), "--data", str(dataset), "--split", "tset"]) == 3
    assert "has no split 'tset'; it has: train, val, test" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_scored(run, dataset, capsys):
    assert main(["evaluate", str(run), "--data", str(dataset), "--out", "/dev/null/x"]) == 2
    told = capsys.readouterr().err
    assert "--out: " in told
    assert told.endswith("choose another folder\n")


@pytest.mark.launch
def test_two_processes_say_it_once_and_write_the_same(run, dataset, tmp_path):
    words = ["evaluate", str(run), "--data", str(dataset), "--out", str(tmp_path / "out")]
    exits = run_command(words, world_size=2)
    require_done(exits)
    assert "test: top1 " in exits[0].last_line
    assert "top1" not in exits[1].output
    assert written_in(tmp_path / "out") == written_in(run / "evaluation" / "test")


def test_files_of_the_users_are_not_overwritten(run, dataset, tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    words = ["evaluate", str(run), "--data", str(dataset), "--out", str(tmp_path)]
    assert main(words) == 2
    assert f"--out: {tmp_path} holds report.html, which is of no" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"
    assert main([*words[:-1], str(run)]) == 2  # the run's own page
