"""A run with the stem for small images: cached features, a kill, and the folder that it leaves."""

from pathlib import Path

import pytest
from tiny_runs import killed_after, make_dataset, require_equal_runs, results, train

from rtl_dist.model.folder import load_model

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.exhaustive
def test_a_run_with_the_small_stem_goes_on_after_a_kill(tmp_path, dataset, monkeypatch):
    features = tmp_path / "features"
    changes = {
        "model": {"name": "resnet18", "weights": "none", "small_stem": True},
        "data__channels": 1,
        "stages": [
            {"name": "head", "steps": 5, "trainable": "head", "lr": 1e-2, "views": 1},
            {"name": "stem", "steps": 3, "trainable": ["stem", "head"], "lr": 1e-3},
        ],
        "checkpoint": {"every": "2 steps"},
        "features": {"cache_dir": str(features)},
    }
    whole = train(tmp_path, dataset, "whole", **changes)
    views = {path.name for path in features.iterdir()}
    assert views
    with killed_after(6, monkeypatch):
        train(tmp_path, dataset, "killed", **changes)
    require_equal_runs(whole, train(tmp_path, dataset, "killed", **changes))
    assert {path.name for path in features.iterdir()} == views
    loaded = load_model(whole)
    assert loaded.model.trunk.conv1.weight.shape == (64, 1, 3, 3)
    assert load_model(sorted((whole / "checkpoints").iterdir())[-1]).model.trunk.conv1.stride == (
        1,
        1,
    )
    assert results(whole)["status"] == "done"

    usual = {**changes, "model": {"name": "resnet18", "weights": "none"}}
    train(tmp_path, dataset, "usual", **usual)
    assert len({path.name for path in features.iterdir()} - views) == len(views)


def test_another_stem_is_another_run(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 1, "trainable": "head", "lr": 1e-2}]
    model = {"name": "resnet18", "weights": "none"}
    train(tmp_path, dataset, stages=stages, model=model)
    train(tmp_path, dataset, code=2, stages=stages, model={**model, "small_stem": True})
    assert "model.small_stem was False and is True" in capsys.readouterr().err
    train(tmp_path, dataset, "cnn", code=2, stages=stages, model__small_stem=True)
    assert "model.small_stem: basic_cnn does not begin with" in capsys.readouterr().err
