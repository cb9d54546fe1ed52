"""A run ends with weights that say how their scores are read; what it is judged by stays raw."""

import json

import numpy as np
import pytest
from tiny_runs import CLASSES, make_dataset, metric_rows, results, train, write_images

from rtl_dist.model.calibration import UNCALIBRATED
from rtl_dist.model.folder import load_model
from rtl_dist.prepare.packing.pack import pack

pytestmark = pytest.mark.usefixtures("without_pictures")
STAGES = [{"name": "all", "steps": 6, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), val=60)


def test_a_run_ends_with_calibrated_weights(tmp_path, dataset, capsys):
    run = train(tmp_path, dataset, stages=STAGES, data__test="test", calibrate__coverage=0.8)
    found = load_model(run).calibration
    assert found.temperature != 1
    assert (found.split, found.num_samples, found.coverage) == ("val", 60, 0.8)
    assert found.dataset_fingerprint == load_model(run).dataset_fingerprint
    told = results(run)
    assert told["calibration"] == found.to_dict()
    test = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    assert test["calibration"] == found.to_dict() | {"told": found.told()}
    assert test["ece"] == told["test"]["ece"] != told["test"]["ece_raw"]
    low, high = test["set_coverage_interval"]
    assert low <= test["set_coverage"] <= high
    assert f"calibrated: {found.told()}" in capsys.readouterr().err
    for page in (run / "report.html", run / "evaluation" / "test" / "report.html"):
        text = page.read_text()
        assert f"Calibrated: {found.told()}." in text
        assert "before calibration" in text
        assert "stated 80 %; 95 % interval" in text
    # epochs are compared by what the network itself says
    assert not [key for row in metric_rows(run) for key in row if key.endswith("_raw")]
    assert min(row["val/loss"] for row in metric_rows(run) if "val/loss" in row) == (
        pytest.approx(told["best"]["loss"])
    )


def test_images_that_were_trained_on_calibrate_nothing(tmp_path, dataset, capsys):
    run = train(tmp_path, dataset, stages=STAGES, data__val="train", data__test="test")
    assert load_model(run).calibration == UNCALIBRATED
    assert results(run)["calibration"] is None
    assert "ece_raw" not in results(run)["test"]
    assert (
        "is not calibrated: data.val is train, which it was trained on" in capsys.readouterr().err
    )
    assert "not calibrated" in (run / "evaluation" / "test" / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_eighteen_images_calibrate_nothing(tmp_path, capsys):
    run = train(tmp_path, make_dataset(tmp_path, val=18), stages=STAGES)
    assert load_model(run).calibration == UNCALIBRATED
    assert "split val has 18 images, and it takes 20" in capsys.readouterr().err


def packed_labels(tmp_path):
    """30 images a split, of two labels each: their colour, and blue."""
    images, folder = write_images(tmp_path / "images", {"train": 10, "val": 10}), tmp_path / "csvs"
    folder.mkdir()
    for split in ("train", "val"):
        lines = ["file,blue,green,red"]
        for path in sorted((images / split).rglob("*.png")):
            flags = ["1" if path.parent.name == name else "0" for name in CLASSES]
            lines.append(f"{path.relative_to(images)},{','.join(flags)}")
        (images / split).rename(folder / split)
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    pack(str(folder), tmp_path / "packed", workers=1, show_progress=False)
    return tmp_path / "packed"


@pytest.mark.parametrize("target", [None, pytest.param(0.6, marks=pytest.mark.exhaustive)])
def test_labels_get_thresholds_of_their_own(tmp_path, target):
    data = packed_labels(tmp_path)
    options = {"stages": STAGES, "data__test": "val", "calibrate__precision_target": target}
    run = train(tmp_path, data, **options)
    found = load_model(run).calibration
    assert found.precision_target == target
    assert "A split of this name: where it is this one" in (run / "report.html").read_text()
    assert found.abstain_below is None
    assert len(found.thresholds) == 3
    told = results(run)["test"]
    assert told["ece"] != told["ece_raw"]
    if target is None:
        assert told["macro_f1"] >= told["macro_f1_raw"]
    counts = np.loadtxt(run / "evaluation" / "val" / "confusion_matrix.csv", delimiter=",",
                        skiprows=1, usecols=(2, 4))  # fmt: skip
    if target is not None:
        said = counts.sum(axis=1) > 0
        assert (counts[said, 1] / counts[said].sum(axis=1) >= target).all()
