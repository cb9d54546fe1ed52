"""Starts that are refused: the right key is named, and nothing is left behind."""

from pathlib import Path

import pytest
from tiny_runs import make_dataset, tiny_config, write_config, write_images

from rtl_dist.train import main


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("data.path={tmp}/nowhere", 3, "no data set at {tmp}/nowhere"),
        (
            "data.path={tmp}/photos",
            3,
            "data.path: {tmp}/photos is no data set yet but what one is packed of; set data.source to it",
        ),
        ("data.path={tmp}/photos/val/red", 3, "set data.source to it"),
        ("data.path={tmp}/c.yaml", 3, "set data.source to it"),
        ("data.test=foo", 3, "has no split 'foo'; it has: train, val, test"),
        ("data.val=foo", 3, "has no split 'foo'"),
        ("model.name=resnet19", 2, "timm has no model 'resnet19'"),
        ("model.weights={tmp}/none.pth", 2, "model.weights: {tmp}/none.pth is missing"),
        ("stages.top.trainable=layer9", 2, "stages.1.trainable: the model has no part 'layer9'"),
        ("run.resume=must", 2, "run.resume: must, but"),
        ("early_stop.metric=val/map", 2, "early_stop.metric: val/map is not measured"),
    ],
)
def test_a_refused_start_leaves_no_folder(dataset, tmp_path, capfd, override, code, said):
    write_images(tmp_path / "photos", {"val": 1})
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "runs" / "a"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["--config", config, override.format(tmp=tmp_path)]) == code
    assert said.format(tmp=tmp_path) in capfd.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_was_there_before_a_refused_start_stays(dataset, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "my.log").write_text("mine")
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run))
    assert main(["--config", config, "model.name=resnet19"]) == 2
    assert (run / "my.log").read_text() == "mine"
