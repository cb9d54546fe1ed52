"""``rtl-dist calibrate``: a model folder whose probabilities fit other data, or another promise."""

import json
import shutil

import pytest
from killed_runs import require_done, run_command
from tiny_runs import make_dataset, newest_checkpoint, train, write_images

from rtl_dist.cli import main
from rtl_dist.model.folder import load_model
from rtl_dist.prepare.packing.pack import pack

STAGES = [{"name": "head", "steps": 4, "trainable": "head", "lr": 1e-2}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset):
    return train(tmp_path_factory.mktemp("run"), dataset, stages=STAGES)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def calibrate(run, dataset, *options):
    return main(["calibrate", str(run), "--data", str(dataset), "--workers", "0", *options])


def test_it_finds_what_the_run_found(run, dataset, capsys):
    before = (run / "best" / "config.json").read_bytes()
    content = json.loads(before)
    del content["rtl_dist"]["calibration"]  # as an earlier version left it
    (run / "best" / "config.json").write_text(json.dumps(content))
    assert not load_model(run).calibration.was_fitted
    assert calibrate(run, dataset) == 0
    assert (run / "best" / "config.json").read_bytes() == before
    said = capsys.readouterr().out
    assert f"{run}/best: {load_model(run).calibration.told()}" in said
    assert f"Next: rtl-dist evaluate {run} --data {dataset}" in said


@pytest.mark.launch
def test_two_processes_find_the_same(run, dataset, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    options = ("--data", str(dataset), "--coverage", "0.7")
    assert calibrate(run, dataset, "--coverage", "0.7") == 0
    exits = run_command(["calibrate", str(other), *options], world_size=2)
    require_done(exits)
    assert "fitted on 21 images" in exits[0].last_line
    assert "fitted" not in exits[1].output
    written = [(folder / "best" / "config.json").read_bytes() for folder in (run, other)]
    assert written[0] == written[1]


def test_a_model_folder_is_calibrated_on_other_data(run, dataset, tmp_path):
    images = write_images(tmp_path / "images", {"train": 8, "test": 2}, seed=7)
    pack(str(images), tmp_path / "packed", workers=1, show_progress=False)
    options = ("--split", "train", "--coverage", "0.5", "--precision-target", "0.8")
    assert calibrate(run / "best", tmp_path / "packed", *options) == 0
    found = load_model(run).calibration
    assert (found.coverage, found.precision_target, found.num_samples) == (0.5, 0.8, 24)
    assert found.split == "train"
    assert found.dataset_fingerprint != load_model(run).dataset_fingerprint


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--coverage", "90"], 2, "calibrate: coverage: must lie between 0 and 1, not 90.0"),
        (["--precision-target", "1"], 2, "precision_target: must lie between 0 and 1, not 1.0"),
        (["--coverage", "nan"], 2, "coverage: expected a number, found nan"),
        (["--split", "train"], 2, "best was trained on split train, of which it is surer than"),
        (["--split", "test"], 3, "split test has 15 images, and it takes 20; choose a split"),
        (["--split", "tset"], 3, "has no split 'tset'; it has: train, val, test"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(run, dataset, capsys, options, code, said):
    before = (run / "best" / "config.json").read_bytes()
    assert calibrate(run, dataset, *options) == code
    told = capsys.readouterr().err.splitlines()[-1]
    assert said in told
    assert (run / "best" / "config.json").read_bytes() == before


def test_a_checkpoint_has_no_place_for_it(run, dataset, capsys):
    assert calibrate(newest_checkpoint(run), dataset) == 2
    assert "is a checkpoint, which keeps no calibration; give the run" in capsys.readouterr().err


def test_a_model_of_other_classes_is_refused(run, tmp_path, capsys):
    images = write_images(tmp_path / "images", {"train": 8})
    (images / "train" / "red").rename(images / "train" / "rose")
    pack(str(images), tmp_path / "packed", workers=1, show_progress=False)
    assert calibrate(run, tmp_path / "packed", "--split", "train") == 2
    assert "use data packed with the same classes" in capsys.readouterr().err
